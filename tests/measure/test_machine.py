"""Tests of the machine description."""

import json
import platform

from featherweight.measure.machine import machine, machine_id


def test_machine_is_json_and_does_not_name_the_host():
    found = machine()
    assert found["cpu"] and found["cores"] >= 1 and "onnxruntime" in found["versions"]
    if len(platform.node()) > 5:
        assert platform.node() not in json.dumps(found)


def test_id_is_short_and_stable():
    assert machine_id() == machine_id() and len(machine_id()) == 12
