import io
from dataclasses import replace

from rich.console import Console

from featherweight.report.tables import candidates_table, variants_table


def _printed(table):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_candidates_table_has_all_and_no_markup(make_run):
    candidates = list(make_run().candidates)
    candidates[0] = replace(candidates[0], verdict="[red]kept[/red]")
    table = candidates_table(candidates)
    assert table.row_count == 6
    text = _printed(table)
    assert "★ net3" in text and "[red]kept[/red]" in text


def test_variants_table_shows_interval_and_every_thread_count(make_run):
    text = _printed(variants_table(make_run().variants))
    for part in ("88.00 – 92.00 %", "0.150 / 0.400 ms", "2 threads", "80.0 kB", "41.0 MB"):
        assert part in text


def test_missing_thread_count_is_a_dash(make_run):
    run = make_run()
    other = replace(run.final, latency_ms=run.final.latency_ms[:1])
    assert "–" in _printed(variants_table({"float32": run.final, "int8": other}))
