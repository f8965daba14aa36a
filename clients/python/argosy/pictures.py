"""Curves as a PNG or in braille, with nothing but the standard library: a few lines and a scale need no drawing package."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

WIDTH, PANEL = 960, 280  # pixels; a panel for each series, one below the other
_LEFT, _RIGHT, _TOP, _BOTTOM = 110, 20, 40, 36  # margins of a panel
_WHITE, _INK, _GRID = b"\xff\xff\xff", b"\x20\x24\x2c", b"\xe4\xe6\xea"
_COLOURS = (b"\x1f\x6f\xd6", b"\xd6\x5a\x1f", b"\x23\x8a\x4d", b"\x8a\x3f\xb0", b"\xb0\x8a\x1f")
_SCALE = 2  # pixels of a dot of a letter

# Letters of three by five dots: a digit a row, its bits the dots.
_LETTERS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71222", "8": "75757",
    "9": "75717", ".": "00002", "-": "00700", "+": "02720", "_": "00007", "a": "25755", "b": "65656", "c": "34443", "d": "65556",
    "e": "74647", "f": "74644", "g": "34553", "h": "55755", "i": "72227", "j": "11152", "k": "55655", "l": "44447", "m": "57755",
    "n": "65555", "o": "25552", "p": "65644", "q": "25563", "r": "65655", "s": "34216", "t": "72222", "u": "55557", "v": "55552",
    "w": "55775", "x": "55255", "y": "55222", "z": "71247",
}  # fmt: skip


class _Canvas:
    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows = [bytearray(_WHITE * width) for _ in range(height)]

    def dot(self, x: int, y: int, colour: bytes) -> None:
        if 0 <= x < self.width and 0 <= y < self.height:
            self.rows[y][3 * x : 3 * x + 3] = colour

    def box(self, x: int, y: int, width: int, height: int, colour: bytes) -> None:
        for down in range(height):
            for across in range(width):
                self.dot(x + across, y + down, colour)

    def line(self, start: tuple[int, int], end: tuple[int, int], colour: bytes) -> None:
        """Two pixels thick."""
        (x, y), (to_x, to_y) = start, end
        count = max(abs(to_x - x), abs(to_y - y), 1)
        for at in range(count + 1):
            self.box(round(x + (to_x - x) * at / count), round(y + (to_y - y) * at / count), 2, 2, colour)

    def text(self, x: int, y: int, said: str, colour: bytes = _INK) -> None:
        """From the upper left corner; what the letters lack stays blank."""
        for letter in said.lower():
            for down, row in enumerate(_LETTERS.get(letter, "00000")):
                for across in range(3):
                    if int(row) >> (2 - across) & 1:
                        self.box(x + across * _SCALE, y + down * _SCALE, _SCALE, _SCALE, colour)
            x += 4 * _SCALE

    def png(self) -> bytes:
        """The picture: eight bits a channel, red, green, blue."""
        raw = zlib.compress(b"".join(b"\0" + row for row in self.rows), 9)
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", raw) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def draw(series: Mapping[str, Sequence[tuple[int, float]]], title: str = "") -> bytes:
    """A PNG with a panel for each series of (step, value), in order. Raises ValueError without a single point."""
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        raise ValueError("there is nothing to plot yet")
    canvas = _Canvas(WIDTH, PANEL * len(drawn))
    for number, (name, points) in enumerate(drawn.items()):
        _panel(canvas, number * PANEL, f"{name}  {title if not number else ''}", points, _COLOURS[number % len(_COLOURS)])
    return canvas.png()


def _panel(canvas: _Canvas, top: int, title: str, points: Sequence[tuple[int, float]], colour: bytes) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    first, last = min(steps), max(*steps, min(steps) + 1)
    wide, tall = WIDTH - _LEFT - _RIGHT, PANEL - _TOP - _BOTTOM
    canvas.text(_LEFT, top + 14, title, colour)
    for tick in range(5):
        y = top + _TOP + tall - round(tall * tick / 4)
        canvas.box(_LEFT, y, wide, 1, _GRID)
        said = f"{low + (high - low) * tick / 4:.4g}"
        canvas.text(_LEFT - 10 - 4 * _SCALE * len(said), y - 5, said)
    for tick in range(5):
        x = _LEFT + round(wide * tick / 4)
        said = f"{first + (last - first) * tick / 4:.6g}"
        canvas.text(x - 2 * _SCALE * len(said), top + PANEL - _BOTTOM + 10, said)

    def place(step: int, value: float) -> tuple[int, int]:
        return _LEFT + round(wide * (step - first) / (last - first)), top + _TOP + tall - round(tall * (value - low) / (high - low))

    places = [place(step, value) for step, value in points]
    for start, end in pairwise(places):
        canvas.line(start, end, colour)
    if len(places) <= 40:  # few enough to be told apart
        for x, y in places:
            canvas.box(x - 2, y - 2, 6, 6, colour)


_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille letter: two columns of four, from the top


def braille(points: Sequence[tuple[int, float]], width: int = 72, height: int = 10) -> list[str]:
    """A series of (step, value) as lines of text with a scale on the left, two by four dots a letter. Raises ValueError for none."""
    if not points:
        raise ValueError("there is nothing to plot yet")
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    cells = [[0] * width for _ in range(height)]

    def place(step: int, value: float) -> tuple[int, int]:
        across = round((2 * width - 1) * (step - first) / ((last - first) or 1))
        return across, round((4 * height - 1) * (high - value) / ((high - low) or 1.0))

    places = [place(step, value) for step, value in points]
    for (x, y), (to_x, to_y) in pairwise([places[0], *places]):
        count = max(abs(to_x - x), abs(to_y - y), 1)
        for at in range(count + 1):
            across, down = round(x + (to_x - x) * at / count), round(y + (to_y - y) * at / count)
            cells[down // 4][across // 2] |= _DOTS[across % 2][down % 4]
    scale = [f"{high - (high - low) * row / max(1, height - 1):.4g}" for row in range(height)]
    wide = max(len(said) for said in scale)
    drawn = [f"{said:>{wide}} ┤{''.join(chr(0x2800 + cell) for cell in cells[row])}" for row, said in enumerate(scale)]
    return [*drawn, f"{'':>{wide}} └{'─' * width}", f"{'':>{wide}}  {first:<{width // 2}}{last:>{width - width // 2}}"]
