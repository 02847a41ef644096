"""A terminal's text as SVG: what ``helix generate`` printed, not retouched."""

from html import escape

_FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_INK, _PAPER, _COMMAND = "#d8dee9", "#2b303b", "#a3be8c"
_SIZE, _LINE, _MARGIN = 13, 18, 14
_CHARACTER = 0.61 * _SIZE  # the widest of the fonts


def terminal(text: str, columns: int = 100) -> str:
    """The SVG of a command, continued by backslashes, and of what it printed.

    Args:
        text: what stood there; longer lines than ``columns`` go on in the next.
        columns: characters a line.
    """
    rows, command = [], True
    for line in text.expandtabs().rstrip("\n").splitlines():
        starts = range(0, max(len(line), 1), columns)
        rows += [(command, line[at : at + columns]) for at in starts]
        command = command and line.endswith("\\")
    width = round(columns * _CHARACTER + 2 * _MARGIN)
    height = len(rows) * _LINE + 2 * _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="{_FONT}" font-size="{_SIZE}">',
        f'<rect width="{width}" height="{height}" rx="6" fill="{_PAPER}"/>',
    ]
    for number, (typed, row) in enumerate(rows):
        y = _MARGIN + number * _LINE + _SIZE
        color = _COMMAND if typed else _INK
        lines.append(
            f'<text x="{_MARGIN}" y="{y}" fill="{color}" xml:space="preserve">{escape(row)}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])
