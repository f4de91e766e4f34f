"""Notebooks show adapters, mixes and reports as small, escaped tables."""

import torch

from shira_diffusers import ShiraAdapter, SparseDelta
from shira_diffusers.adapters.notebook import MixTable, ReportTable

HOSTILE = "<script>alert('1')</script>"


def test_an_adapter_shows_its_size_and_its_metadata() -> None:
    delta = SparseDelta(torch.tensor([0, 3], dtype=torch.int32), torch.ones(2), (4, 25))
    adapter = ShiraAdapter({"unet.a.weight": delta}, {"base_model": HOSTILE, "long": "x" * 10_000})
    shown = adapter._repr_html_()
    assert "<td>2 of 100 (2.00%)</td>" in shown
    assert "<td>base_model</td><td>&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;</td>" in shown
    assert "<script" not in shown
    assert len(shown) < 1000


def test_a_mix_is_a_dict_and_shows_its_strengths() -> None:
    mix = MixTable({"a": 0.7, HOSTILE: {"unet": 0.5}})
    assert mix == {"a": 0.7, HOSTILE: {"unet": 0.5}}
    assert "<td>a</td><td>0.7</td>" in mix._repr_html_()
    assert "<script" not in mix._repr_html_()


def test_a_report_is_a_row_per_pair() -> None:
    report = ReportTable({("a", HOSTILE): {"overlap": 0.123456, "l2": 12.0}})
    assert report._repr_html_() == (
        "<table><tr><th>adapter</th><th>with</th><th>overlap</th><th>l2</th></tr>"
        "<tr><td>a</td><td>&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;</td><td>0.1235</td><td>12</td></tr></table>"
    )
    assert ReportTable()._repr_html_() == "<table><tr><th>adapter</th><th>with</th></tr></table>"
