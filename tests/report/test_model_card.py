import re

import pytest

from featherweight.report.model_card import render_model_card, write_model_card


def test_card_has_front_matter_sections_and_intervals(make_run):
    text = render_model_card(make_run())
    assert text.startswith("---\nlibrary_name: onnx\n")
    for heading in ("Intended use", "Metrics", "How to run", "Preprocessing", "Data", "Classes", "Limits"):
        assert f"\n## {heading}\n" in text
    assert "88.00 – 92.00 %" in text and "model.int8.onnx" in text


def test_front_matter_is_yaml(make_run):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    title = 'a: "b" # c\n- d'
    front = yaml.safe_load(render_model_card(make_run(title=title)).split("---\n")[1])
    result = front["model-index"][0]
    assert result["name"] == title
    assert [metric["value"] for metric in result["results"][0]["metrics"]] == [0.9, 0.9]


def test_hostile_class_names_stay_text_in_one_cell(make_run):
    text = render_model_card(make_run(command="fit ```\n<script>"))
    outside_code = re.sub(r"(?s)^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE)
    assert "<script" not in outside_code.replace("\\<", "")
    assert r"a\|b" in text


def test_snippet_is_python(make_run):
    code = re.search(r"```python\n(.*?)```", render_model_card(make_run()), re.DOTALL)[1]
    compile(code, "snippet", "exec")


def test_card_without_measurements_still_writes(make_run, tmp_path):
    run = make_run(
        variants={}, confusion=None, candidates=(), dataset={}, preprocess={}, machine={}, budget={}
    )
    path = write_model_card(run, tmp_path / "README.md")
    assert "## Limits" in path.read_text(encoding="utf-8")
