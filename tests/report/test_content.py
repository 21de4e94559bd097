import numpy as np
import pytest

from featherweight.errors import FeatherweightError
from featherweight.report.content import sort_candidates


def test_int8_is_deployed_unless_another_is_named(make_run):
    assert make_run().deployed == "int8"
    assert make_run(deployed="float32").final.size_bytes == 80_000


def test_confusion_of_the_wrong_size_is_refused(make_run):
    with pytest.raises(FeatherweightError, match="Confusion matrix"):
        make_run(confusion=np.zeros((3, 3), int))


def test_percentages_are_refused(make_run):
    run = make_run()
    wrong = type(run.final)(99.0, (0.9, 1.0), [], 1, 1, 1)
    with pytest.raises(FeatherweightError, match="fractions"):
        make_run(variants={"int8": wrong})


def test_unknown_deployed_variant_is_refused(make_run):
    with pytest.raises(FeatherweightError, match="float32, int8"):
        make_run(deployed="int4")


def test_candidates_sort_chosen_first_and_untrained_last(make_run):
    names = [point.name for point in sort_candidates(make_run().candidates)]
    assert names == ["net3", "net1", "net0", "net2", "net4", "net5"]
