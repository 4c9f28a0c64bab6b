"""The table of all runs: the results under a folder, as rows of a table, as lines of a CSV file and as curves.

report.py makes a Summary of a folder, prints and saves what its functions return, and hands the curves to
support/charts.py. A file that is no result of train.py is left out, with a warning that names it.
"""

import math
import statistics
from typing import NamedTuple

from clip_min import UserError
from support.apart import tell_apart
from support.benchmarks import BENCHMARKS
from support.results import ALL, ZERO_SHOT, read_result


class Cell(NamedTuple):
    accuracies: list  # of the seeds
    papers: list  # [(accuracy, source), ...]


class Summary:
    """All runs under a folder.

    cells      {Row: {column: Cell}}
    starts     {curve: {column: accuracy of zero-shot CLIP}}
    variances  {column: {curve: UPT's variances of zero-shot CLIP}}, where --variance measured them
    halves     the columns of those halves of the classes that --base-to-new trains on
    columns    data sets, then shifts and new classes, then an average over the data sets
    """

    def __init__(self, out, zero_shot_options):
        """zero_shot_options: the default options of the method zeroshot."""
        self.cells, self.starts, self.variances, self.halves, results = {}, {}, {}, set(), []
        for path in sorted(out.rglob("result.json")):
            is_in_the_making = any(part.startswith(".") for part in path.relative_to(out).parts)
            found = None if is_in_the_making else read_result(path, zero_shot_options)
            if found:
                results.append((path.parent, *found))
        results, apart = tell_apart(results)
        for entries, result in results:
            self.add(entries, result)
        if not self.cells:
            raise UserError(f"There is no result.json under {out}: train something first, or give its --out.")
        data_sets = {column for start in self.starts.values() for column in start} - self.halves
        others = {column for row in self.cells.values() for column in row} - data_sets
        self.columns = sorted(data_sets) + sorted(others)
        data_sets -= apart  # two states of one data set are not two data sets
        self.add_average({name for name in data_sets if name in BENCHMARKS} or data_sets)

    def add(self, entries, result):
        """Take in what read_result() gives."""
        for entry in entries:
            cell = self.cells.setdefault(entry.row, {}).setdefault(entry.column, Cell([], entry.papers))
            if entry.row.shots != ZERO_SHOT or not cell.accuracies:  # zero-shot CLIP is the same for all seeds
                cell.accuracies.append(entry.accuracy)
        zero_shot, run = entries[:2]
        if result.get("base_to_new"):
            self.halves.add(zero_shot.column)
        self.starts.setdefault(run.row.curve, {})[zero_shot.column] = zero_shot.accuracy
        if result["variance"]:
            self.variances.setdefault(zero_shot.column, {})[run.row.curve] = result["variance"]["before"]

    def add_average(self, data_sets):
        """A column for the rows that have all these data sets, if they are more than one."""
        if len(data_sets) < 2:
            return
        average = f"average of {len(data_sets)}"
        self.columns.append(average)
        for row in self.cells.values():
            if row.keys() >= data_sets:
                means = [statistics.mean(row[name].accuracies) for name in data_sets]
                row[average] = Cell([statistics.mean(means)], [])
        for start in self.starts.values():
            if start.keys() >= data_sets:
                start[average] = statistics.mean(start[name] for name in data_sets)

    def rows(self):
        """-> the rows in the order of the table: for each backbone zero-shot CLIP first."""
        def order(row):
            return row.backbone, row.shots != ZERO_SHOT, row.method, by_shots(row.shots)
        return sorted(self.cells, key=order)

    def table(self):
        """-> the head and the rows of the table for people."""
        lines = []
        for row in self.rows():
            cells = self.cells[row]
            lines.append([*row, *(cell_text(*cells[column]) if column in cells else "" for column in self.columns)])
        return ["method", "backbone", "shots", *self.columns], lines

    def csv_lines(self):
        """-> the table for programs: a head, and a line for every cell."""
        lines = [("method", "backbone", "shots", "data", "seeds", "mean", "standard deviation", "papers", "sources")]
        for row in self.rows():
            for column, (accuracies, papers) in self.cells[row].items():
                deviation = statistics.pstdev(accuracies) if len(accuracies) > 1 else ""
                numbers = "; ".join(str(value) for value, _ in papers)
                sources = "; ".join(source for _, source in papers)
                lines.append((*row, column, len(accuracies), statistics.mean(accuracies), deviation, numbers, sources))
        return lines

    def curves(self):
        """-> {column: {curve: {shots: accuracies of the seeds}}}. Each curve begins at zero-shot CLIP."""
        curves = {}
        for row in self.rows():
            starts = self.starts.get(row.curve, {})
            for column, cell in self.cells[row].items():
                if row.shots != ZERO_SHOT and column in starts:
                    curve = curves.setdefault(column, {}).setdefault(row.curve, {ZERO_SHOT: [starts[column]]})
                    curve[row.shots] = cell.accuracies
        return curves

    def gains(self):
        """-> {curve: {column: gain over zero-shot CLIP in percentage points}}, of the most shots that there are."""
        gains = {}
        for column, curves in sorted(self.curves().items()):
            for name, curve in sorted(curves.items()):
                most = max(curve, key=by_shots)
                gains.setdefault(name, {})[column] = statistics.mean(curve[most]) - curve[ZERO_SHOT][0]
        return gains


def by_shots(shots):
    """For sorting: zero-shot CLIP first, all pictures last."""
    return math.inf if shots == ALL else int(shots)


def cell_text(accuracies, papers):
    text = f"{statistics.mean(accuracies):.2f}"
    if len(accuracies) > 1:
        text += f" ± {statistics.pstdev(accuracies):.2f} ({len(accuracies)})"
    return "; ".join([text, *(f"{source}: {value:.2f}" for value, source in papers)])
