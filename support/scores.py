"""How well a run knows each class: right answers, precision and F1, and what is taken for what.

report.py calls score() with the rows of predictions.csv. The numbers are those of scikit-learn, where a class that is
never predicted, or has no pictures, has a precision, a recall and an F1 of 0.
"""

import statistics
from collections import Counter
from typing import NamedTuple

HEAD = ["class", "right", "of", "%", "precision", "F1"]


class Scores(NamedTuple):
    """Numbers in percent."""

    classes: list  # rows as HEAD names them, the worst class first; at the end those without pictures
    confused: list  # rows (class, taken for, times), the most frequent first
    balanced: float  # the mean of the right answers over the classes with pictures
    macro_f1: float  # the mean of F1 over all classes that have pictures or are predicted

    def csv_lines(self):
        """-> the lines of report.csv: a head, to which the words near the contexts belong as well, and all numbers."""
        head = ("table", "class or context", "right, taken for or word", "of, times or distance", *HEAD[3:])
        mean = ("mean", "of the classes", "", "", f"{self.balanced:.2f}", "", f"{self.macro_f1:.2f}")
        classes, confused = ([(table, *row) for row in rows] for table, rows in (
            ("class", self.classes), ("confusion", self.confused)))
        return [head, *classes, mean, *confused]


def score(predictions):
    """predictions: a dictionary for each picture, with its class and its predicted class -> Scores."""
    answers = Counter((row["class"], row["predicted class"]) for row in predictions)
    pictures = Counter(row["class"] for row in predictions)
    predicted = Counter(row["predicted class"] for row in predictions)
    names = sorted(pictures, key=lambda name: answers[name, name] / pictures[name])
    classes, recalls, all_f1 = [], [], []
    for name in [*names, *(name for name in predicted if name not in pictures)]:
        right, of = answers[name, name], pictures[name]
        precision = 100 * right / max(predicted[name], 1)
        f1 = 100 * 2 * right / (of + predicted[name])
        classes.append((name, right, of, f"{100 * right / of:.1f}" if of else "", f"{precision:.2f}", f"{f1:.2f}"))
        recalls += [100 * right / of] if of else []
        all_f1.append(f1)
    confused = [(*pair, count) for pair, count in answers.most_common() if pair[0] != pair[1]]
    return Scores(classes, confused, statistics.mean(recalls), statistics.mean(all_f1))
