"""What support/output.py prints: tables that stay tables whatever stands in them."""

import re

import pytest

import report
import train
from support.output import print_table


def cells(line):
    """A row of a Markdown table -> its cells, as a renderer parts them."""
    parted = re.split(r"(?<!\\)\|", line)
    assert parted[0] == parted[-1] == ""
    return [cell.strip().replace(r"\|", "|") for cell in parted[1:-1]]


@pytest.mark.parametrize("name", ["a|b", "|", "a || b", "plain", "two\nlines", ""])
def test_a_cell_stays_one_cell(capsys, name):
    print_table("title", ["class", name], [(name, 1)])
    head, rule, row = capsys.readouterr().out.splitlines()[3:]
    assert cells(head) == ["class", name.replace("\n", " ")] and cells(row) == [name.replace("\n", " "), "1"]
    assert rule == "| --- | --- |"


def test_two_prompts_of_a_template_are_one_cell_of_the_table(tmp_path, capsys):
    flags = ["--method", "zeroshot", "--template", "a photo of a {}.", "art of a {}.", "--device", "cpu"]
    root = ["--root", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    assert train.main([*flags, *root]) == 0
    capsys.readouterr()
    assert report.main(["--out", str(tmp_path / "runs")]) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and rows[-1][0].endswith("template=a photo of a {}. | art of a {}.")
