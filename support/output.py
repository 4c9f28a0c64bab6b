"""What the programs give out besides runs: tables on the screen, and files that are written whole or not at all.

report.py calls all of it, and support/changes.py save(). What cannot be written ends in one sentence that names it.
"""

import csv
import io
import json
import math
import sys
from contextlib import suppress

from clip_min import UserError


def save(path, content):
    """Write bytes, whole or not at all: into a file beside `path`, which then takes its place."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            part.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}): make room or choose another place.") from error
    print(f"saved         {path}", file=sys.stderr)  # stdout may be a file for the tables


def save_csv(path, rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    save(path, text.getvalue().encode("utf-8", "surrogateescape"))


def save_picture(path, write):
    """write: the function of Pillow's Image, or of matplotlib's Figure, that writes it into a file."""
    content = io.BytesIO()
    write(content, format="png")
    save(path, content.getvalue())


def save_tensor(path, name, tensor, notes):
    """Write an fp32 tensor as safetensors: eight bytes of header length, a JSON header, the numbers.

    notes: {key: text}, what the header says besides.
    """
    entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [0, 4 * tensor.numel()]}
    header = json.dumps({"__metadata__": notes, name: entry}).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers can be mapped into memory
    save(path, len(header).to_bytes(8, "little") + header + tensor.cpu().numpy().tobytes())


def print_table(title, head, rows):
    """Print a Markdown table."""
    print(f"\n{title}\n")
    for row in [head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(map(table_cell, row))} |")


def table_cell(value):
    """A class name may have what would end its cell or its row."""
    return " ".join(str(value).splitlines()).replace("|", r"\|")


def loss_bars(losses):
    """-> the losses of the epochs as a line of at most 60 bars, with the first and the last in numbers."""
    low, extent = min(losses), max(losses) - min(losses) or 1
    shown = losses[:: math.ceil(len(losses) / 60)]
    bars = "".join("▁▂▃▄▅▆▇█"[int(7 * (loss - low) / extent)] for loss in shown)
    return f"{bars} from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} epochs"
