"""The model card: a README.md in the style of the Hugging Face hub, beside the exported files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featherweight.files import atomic_write
from featherweight.report.content import RunReport, VariantResult
from featherweight.report.html import cell_text
from featherweight.report.tables import variant_rows
from featherweight.report.units import budget_rows, format_percent, format_seconds

FILES = {"float32": "model.onnx", "int8": "model.int8.onnx"}
MAX_LISTED_CLASSES = 200

RUN_SNIPPET = """\
With featherweight (loads onnxruntime, not torch):

```sh
featherweight predict {file} photo.jpg --top 3
```

In Python:

```python
import numpy as np
import onnxruntime
from featherweight.data.images import open_image
from featherweight.data.preprocess import Preprocess

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
embedded = session.get_modelmeta().custom_metadata_map
preprocess = Preprocess.from_json(embedded["featherweight.preprocess"])
labels = open("labels.txt", encoding="utf-8").read().splitlines()

logits = session.run(["logits"], {{"image": preprocess.apply(open_image("photo.jpg"))[None]}})[0][0]
probabilities = np.exp(logits - logits.max())
probabilities /= probabilities.sum()
for index in probabilities.argsort()[::-1][:3]:
    print(labels[index], f"{{probabilities[index]:.1%}}")
```
"""

LIMITS = """\
- It answers with one of the classes above for any image, also for one that shows none of them. Confidence
  is not calibrated; choose a threshold on your own images.
- The figures hold for images like those of the test split. Other cameras, light or framing can be worse:
  `featherweight evaluate` measures it on a folder of yours.
- Latency was measured on the machine named below and does not carry over to another.
- Not tested for fairness between groups of people, nor against deliberate attacks. Not meant for decisions on
  health, safety or rights without a person's review.
"""


def _escape(text: object) -> str:
    """Make any text safe for a line or a table cell of Markdown: class names may hold markup."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#$~!&])", r"\\\1", flat)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], right_from: int = 1) -> str:
    rule = ["---" if index < right_from else "---:" for index in range(len(header))]
    lines = [[_escape(cell) for cell in header], rule, *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quote(value: object) -> str:
    # a JSON string is a YAML string, whatever stands in it
    return json.dumps(str(value), ensure_ascii=False)


def _front_matter(content: RunReport) -> str:
    data = content.dataset.get("name", "images")
    lines = [
        "---",
        "library_name: onnx",
        "pipeline_tag: image-classification",
        "tags: [image-classification, onnx, featherweight, edge]",
    ]
    if content.final:
        lines += [
            "metrics: [accuracy]",
            "model-index:",
            f"- name: {_quote(content.title)}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {_quote(data)}, type: {_quote(data)}, split: test}}",
            "    metrics:",
        ]
        for name, variant in content.variants.items():
            metric = f"{{type: accuracy, name: {_quote(name)}, value: {variant.test_accuracy:.4f}}}"
            lines.append(f"    - {metric}")
    return "\n".join([*lines, "---"])


def _summary(content: RunReport) -> str:
    chosen, final = content.chosen, content.final
    what = f"{chosen.label}, " if chosen else ""
    shipped = f"shipped as {content.deployed or 'ONNX'}"
    text = f"Image classifier for {len(content.classes)} classes ({what}{shipped})."
    if final:
        low, high = final.test_accuracy_interval
        text += (
            f" Test accuracy {format_percent(final.test_accuracy)}"
            f" (95 % interval {format_percent(low)} to {format_percent(high)})."
        )
    return _escape(text)


def _facts(facts: dict[str, Any]) -> str:
    rows = [(str(key).replace("_", " "), cell_text(value)) for key, value in facts.items()]
    return _table(("", "value"), rows, right_from=2)


def _class_table(content: RunReport, final: VariantResult) -> str:
    rows = [
        (row["name"], format_percent(row["precision"]), format_percent(row["recall"]), row["support"])
        for row in final.per_class
    ]
    return _table(("class", "precision", "recall", "test images"), rows)


def _classes(content: RunReport) -> str:
    if content.final and content.final.per_class and len(content.classes) <= MAX_LISTED_CLASSES:
        return _class_table(content, content.final)
    listed = ", ".join(_escape(name) for name in content.classes[:MAX_LISTED_CLASSES])
    rest = len(content.classes) - MAX_LISTED_CLASSES
    return f"{listed}{f' and {rest} more' if rest > 0 else ''}. The whole list is in `labels.txt`."


def _fenced(text: str) -> str:
    # longer than any run of backticks inside, so that the text cannot end the block
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def render_model_card(content: RunReport) -> str:
    """Return the model card as Markdown with YAML front matter.

    Args:
        content: what the run measured; parts without data leave their section out.
    """
    file = FILES.get(content.deployed, "model.onnx")
    steps = [(name, format_seconds(seconds)) for name, seconds in content.steps_s.items()]
    remarks = "\n".join(f"- {_escape(text)}" for text in [*content.warnings, *content.notes])
    metrics = _table(
        ("", *content.variants), [(label, *cells) for label, cells in variant_rows(content.variants)]
    )
    sections = (
        ("Intended use", "Sorting images like those it was trained on, offline and on small processors."),
        ("Metrics", f"Test split; batch 1, onnxruntime.\n\n{metrics}" if content.variants else ""),
        ("How to run", RUN_SNIPPET.format(file=file)),
        ("Preprocessing", _preprocessing(content)),
        ("Data", _facts(dict(content.dataset)) if content.dataset else ""),
        ("Classes", _classes(content)),
        ("Limits", LIMITS),
        ("Remarks of this run", remarks),
        ("How it was made", _fenced(content.command)),
        ("Budget", _table(("limit", "value"), budget_rows(dict(content.budget))) if content.budget else ""),
        ("Wall time", _table(("step", "time"), steps) if steps else ""),
        ("Machine", _facts(dict(content.machine)) if content.machine else ""),
    )
    body = [f"## {name}\n\n{text.strip()}" for name, text in sections if text]
    made = f"Made by featherweight {content.version}{f' on {content.created}' if content.created else ''}."
    head = [_front_matter(content), f"# {_escape(content.title)}", _summary(content)]
    return "\n\n".join([*head, *body, made.replace("  ", " ")]) + "\n"


def _preprocessing(content: RunReport) -> str:
    if not content.preprocess:
        return ""
    return (
        "Part of the model: stored in its metadata (`featherweight.preprocess`) and in `preprocess.json`.\n\n"
        + _facts(dict(content.preprocess))
    )


def write_model_card(content: RunReport, path: str | Path) -> Path:
    """Write the model card to `path`, atomically, and return the path.

    Raises:
        WriteError: the file cannot be written; an older card is left as it was.
    """
    return atomic_write(path, render_model_card(content))
