"""Seeded pictures with exact questions and answers: the world that `vz-demo` is trained to see.

A scene is a picture of 220 to 900 pixels a side: a cluttered light background (gradient, stripes, noise, thin
lines), 1 to 5 coloured shapes that do not overlap, and in half of the pictures a printed number of 1 to 3 digits.
Everything is drawn by Pillow with its built-in scalable font, so no file is needed and a seed is a picture.

The kinds of question, with one example each:

    presence   is there a red circle?                        yes / no
    colour     what color is the triangle?                   red, green, blue, black, gray, teal, brown, yellow
    shape      what shape is the red object?                 circle, rectangle, triangle, star
    count      how many circles are there?                   0 to 5
    position   is the red circle left of the blue star?      yes / no
    reading    what number is written?                       "482", or none

Ground truth for dense losses comes along: `Scene.labels` says for every pixel which `Scene.items` entry covers it.
The second half of the file reads easy-VQA (PyPI `easy-vqa`: 64x64 pictures with one shape, 13 answers).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPE_NAMES = ("circle", "rectangle", "triangle", "star")
KINDS = ("presence", "colour", "shape", "count", "position", "reading")

Question = tuple[str, str, str]  # question, answer, kind
EasyVqaEntry = tuple[Path, list[tuple[str, str]]]  # a picture file and its (question, answer) pairs


@dataclass(frozen=True)
class Item:
    """One thing in a picture: a coloured shape, or a printed digit (`colour` is None)."""

    what: str  # a name of SHAPE_NAMES, or "0" to "9"
    colour: str | None
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture, its questions, and for every pixel the 1-based index of the item there (0 is background)."""

    image: Image.Image
    questions: list[Question]
    items: tuple[Item, ...]
    labels: Image.Image  # mode "L", same size


def make_scenes(seed: int, count: int) -> list[Scene]:
    """`count` scenes; the same seed gives the same scenes."""
    return [make_scene(np.random.default_rng((seed, index))) for index in range(count)]


def make_scene(rng: np.random.Generator) -> Scene:
    """One scene; its size is drawn so that anyres gives 2 tiles (a fifth), 3 (a fifth), 4 (a tenth) or 5."""
    width, height = _size(rng)
    image = _background(rng, width, height)
    labels = Image.new("L", image.size)
    placed: list[tuple[float, float, float, float]] = []
    items: list[Item] = []
    if rng.random() < 0.5:
        items += _write_number(rng, image, labels, placed)
    shape_count = int(rng.integers(1, 6))
    for _ in range(shape_count):
        item = _place_shape(rng, image, labels, placed, index=len(items) + 1)
        if item is not None:
            items.append(item)
    return Scene(image, ask(rng, items, image.size), tuple(items), labels)


def make_plain_scene(rng: np.random.Generator) -> Scene:
    """One shape on an even light background, 64x64: a picture in the manner of easy-VQA (no questions)."""
    light = rng.integers(228, 256, 3)
    image = Image.new("RGB", (64, 64), tuple(int(value) for value in light))
    labels = Image.new("L", image.size)
    size = float(rng.uniform(14, 36))
    x, y = rng.uniform(size / 2, 64 - size / 2, 2)
    item = _draw_shape(rng, image, labels, (x, y), size, 1, SHAPE_NAMES[rng.integers(3)], jitter=0, tilt=0)
    return Scene(image, [], (item,), labels)


def _size(rng: np.random.Generator) -> tuple[int, int]:
    draw = rng.random()
    if draw < 0.5:
        return int(rng.integers(336, 901)), int(rng.integers(336, 901))
    if draw < 0.7:
        return int(rng.integers(224, 337)), int(rng.integers(224, 337))
    long = int(rng.integers(700, 901))
    short = int(long / (rng.uniform(2, 2.2) if draw < 0.9 else rng.uniform(3, 3.2)))
    return (long, short) if rng.random() < 0.5 else (short, long)


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Gradient between two light colours, plus stripes, noise and thin lines, each in some of the pictures."""
    first, second = rng.uniform(170, 255, (2, 3)).astype(np.float32)
    angle, pitch, phase = rng.uniform(0, 2 * np.pi), rng.uniform(8, 60), rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * np.arange(width)[None, :] + np.sin(angle) * np.arange(height)[:, None]
    along = along.astype(np.float32)
    mix = ((along - along.min()) / (np.ptp(along) + 1))[..., None]
    pixels = first + (second - first) * mix
    if rng.random() < 0.5:
        stripes = np.sin(along * np.float32(2 * np.pi / pitch) + np.float32(phase))
        pixels += np.float32(rng.uniform(4, 22)) * stripes[..., None]
    if rng.random() < 0.6:
        grain = int(rng.integers(1, 5))
        noise = rng.standard_normal((height // grain + 1, width // grain + 1), dtype=np.float32)
        noise = noise.repeat(grain, 0).repeat(grain, 1)[:height, :width]
        pixels += np.float32(rng.uniform(2, 14)) * noise[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 9))):
        ends = rng.uniform(0, 1, 4) * (width, height, width, height)
        draw.line(
            [float(end) for end in ends],
            tuple(int(v) for v in rng.integers(0, 256, 3)),
            int(rng.integers(1, 4)),
        )
    return image


def _free_spot(
    rng: np.random.Generator,
    placed: list[tuple[float, float, float, float]],
    size: tuple[int, int],
    w: float,
    h: float,
) -> tuple[float, float] | None:
    """Top left corner of a w x h box that touches none of `placed`, or None after 30 tries."""
    for _ in range(30):
        x, y = rng.uniform(2, size[0] - w - 2), rng.uniform(2, size[1] - h - 2)
        if all(
            x + w < left - 4 or right + 4 < x or y + h < top - 4 or bottom + 4 < y
            for left, top, right, bottom in placed
        ):
            placed.append((x, y, x + w, y + h))
            return float(x), float(y)
    return None


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _write_number(
    rng: np.random.Generator,
    image: Image.Image,
    labels: Image.Image,
    placed: list[tuple[float, float, float, float]],
) -> list[Item]:
    """Prints 1 to 3 dark digits, half of the time on a light plate; one item a digit, its label the digit's box."""
    text = str(rng.integers(0, 10 ** int(rng.integers(1, 4))))
    font = _font(int(min(image.size) * rng.uniform(0.12, 0.3)))
    left, top, right, bottom = font.getbbox(text)
    margin = (bottom - top) * 0.2
    spot = _free_spot(rng, placed, image.size, right - left + 2 * margin, bottom - top + 2 * margin)
    if spot is None:
        return []
    draw, draw_labels = ImageDraw.Draw(image), ImageDraw.Draw(labels)
    if rng.random() < 0.5:
        plate = tuple(int(v) for v in rng.integers(225, 256, 3))
        draw.rectangle((*spot, *placed[-1][2:]), fill=plate, outline=(90, 90, 90))
    x, y = spot[0] + margin - left, spot[1] + margin - top
    draw.text((x, y), text, tuple(int(v) for v in rng.integers(0, 90, 3)), font)
    items = []
    for position, digit in enumerate(text):
        from_x = x + font.getlength(text[:position])
        box = (from_x, y + top, from_x + font.getlength(digit), y + bottom)
        items.append(Item(digit, None, box))
        draw_labels.rectangle(box, fill=len(items))
    return items


def _place_shape(
    rng: np.random.Generator,
    image: Image.Image,
    labels: Image.Image,
    placed: list[tuple[float, float, float, float]],
    index: int,
) -> Item | None:
    size = float(min(image.size) * rng.uniform(0.14, 0.38))
    spot = _free_spot(rng, placed, image.size, size, size)
    if spot is None:
        return None
    centre = (spot[0] + size / 2, spot[1] + size / 2)
    return _draw_shape(
        rng, image, labels, centre, size, index, SHAPE_NAMES[rng.integers(len(SHAPE_NAMES))], jitter=14, tilt=0.25
    )


def _draw_shape(
    rng: np.random.Generator,
    image: Image.Image,
    labels: Image.Image,
    centre: tuple[float, float],
    size: float,
    index: int,
    shape: str,
    jitter: int,
    tilt: float,
) -> Item:
    """Draws the shape inside a circle of diameter `size`, turned by at most `tilt`, on picture and label map."""
    colour = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
    wobble = rng.integers(-jitter, jitter + 1, 3)
    fill = tuple(int(v) for v in (np.array(COLOURS[colour]) + wobble).clip(0, 255))
    turn, radius = rng.uniform(-tilt, tilt) - np.pi / 2, size / 2
    if shape == "circle":
        corners = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        reach = np.full(40, radius * rng.uniform(0.8, 1))
    elif shape == "rectangle":
        half = np.arctan(rng.uniform(0.4, 1))
        half = half if rng.random() < 0.5 else np.pi / 2 - half
        corners, reach = np.array([half, np.pi - half, np.pi + half, -half]), np.full(4, radius)
    elif shape == "triangle":
        corners = np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.15, 0.15, 3)
        reach = np.full(3, radius)
    else:
        corners, reach = np.arange(10) * np.pi / 5, radius * np.tile([1, 0.42], 5)
    xy = np.stack([centre[0] + reach * np.cos(corners + turn), centre[1] + reach * np.sin(corners + turn)], axis=1)
    outline = [(float(x), float(y)) for x, y in xy]
    ImageDraw.Draw(image).polygon(outline, fill)
    ImageDraw.Draw(labels).polygon(outline, index)
    return Item(shape, colour, (*xy.min(0).tolist(), *xy.max(0).tolist()))


def picker(rng: np.random.Generator):
    """A function that picks one of its options."""
    return lambda options: options[int(rng.integers(len(options)))]


def ask(rng: np.random.Generator, items: list[Item], size: tuple[int, int]) -> list[Question]:
    """About a dozen questions on one picture; yes and no are balanced where that is possible."""
    shapes = [item for item in items if item.colour]
    number = "".join(item.what for item in items if item.colour is None)
    pick = picker(rng)
    questions = _ask_presence(pick, shapes, number)
    by_shape = {name: [item for item in shapes if item.what == name] for name in SHAPE_NAMES}
    by_colour = {name: [item for item in shapes if item.colour == name] for name in COLOUR_NAMES}
    for name, found in by_shape.items():
        if len(found) == 1:
            text = pick(["what color is the {}?", "what is the color of the {}?", "which color does the {} have?"])
            questions.append((text.format(name), found[0].colour, "colour"))
    for name, found in by_colour.items():
        if len(found) == 1:
            text = pick(
                [
                    "what shape is the {} object?",
                    "what is the {} shape?",
                    "what is the shape of the {} object?",
                ]
            )
            questions.append((text.format(name), found[0].what, "shape"))
    name = pick([item.what for item in shapes] or list(SHAPE_NAMES))
    for counted in (name, pick(SHAPE_NAMES)):
        text = pick(["how many {}s are there?", "how many {}s do you see?", "count the {}s."])
        questions.append((text.format(counted), str(len(by_shape[counted])), "count"))
    name = pick([item.colour for item in shapes] or list(COLOUR_NAMES))
    text = pick(["how many {} objects are there?", "how many {} shapes are there?"])
    questions.append((text.format(name), str(len(by_colour[name])), "count"))
    text = pick(["how many objects are there?", "how many shapes are there?"])
    questions.append((text, str(len(shapes)), "count"))
    questions += _ask_position(rng, pick, shapes, size)
    text = pick(
        [
            "what number is written?",
            "which number is written here?",
            "what number do you see?",
            "read the number.",
        ]
    )
    questions.append((text, number or "none", "reading"))
    return questions


def _ask_presence(pick, shapes: list[Item], number: str) -> list[Question]:
    """Pairs of colour and shape (the absent ones share a colour or a shape with something there), then one alone."""
    pairs = sorted({(item.colour, item.what) for item in shapes})
    absent = [(c, s) for c in COLOUR_NAMES for s in SHAPE_NAMES if (c, s) not in pairs]
    near = [(c, s) for c, s in absent if any(c == p[0] or s == p[1] for p in pairs)]
    asked = [(pick(near), "no"), (pick(near), "no"), (pick(pairs), "yes"), (pick(pairs), "yes")] if pairs else []
    questions = []
    for (colour, shape), answer in asked:
        text = pick(["is there a {} {}?", "do you see a {} {}?", "does the image contain a {} {}?"])
        questions.append((text.format(colour, shape), answer, "presence"))
    questions += ask_attributes(pick, shapes)
    questions.append(("is there a number?", "yes" if number else "no", "presence"))
    return questions


def ask_attributes(pick, shapes: list[Item]) -> list[Question]:
    """Is there anything of this colour, of this shape? As many yes as no, where that is possible."""
    questions = []
    for names, there, noun in (
        (COLOUR_NAMES, {item.colour for item in shapes}, " shape"),
        (SHAPE_NAMES[:3], {item.what for item in shapes}, ""),
    ):
        for answer in ("yes", "no"):
            options = [name for name in names if (name in there) == (answer == "yes")]
            if options:
                text = pick(["is there a {}{}?", "is a {}{} present?", "does the image contain a {}{}?"])
                questions.append((text.format(pick(options), noun), answer, "presence"))
    return questions


def _ask_position(rng: np.random.Generator, pick, shapes: list[Item], size: tuple[int, int]) -> list[Question]:
    """Left of, right of, above, below; only things named uniquely and at least a tenth of the picture apart."""
    names = [f"{item.colour} {item.what}" for item in shapes]
    unique = [item for item, name in zip(shapes, names, strict=True) if names.count(name) == 1]
    questions: list[Question] = []
    for _ in range(3 if len(unique) >= 2 else 0):
        first, second = (unique[i] for i in rng.permutation(len(unique))[:2])
        axis = int(rng.integers(2))
        gap = (second.centre[axis] - first.centre[axis]) / size[axis]
        if abs(gap) < 0.1:
            continue
        words = pick(
            [("left of", "right of"), ("to the left of", "to the right of")] if axis == 0 else [("above", "below")]
        )
        side = int(rng.integers(2))
        answer = "yes" if (gap > 0) == (side == 0) else "no"
        text = f"is the {first.colour} {first.what} {words[side]} the {second.colour} {second.what}?"
        if all(text != question for question, _, _ in questions):
            questions.append((text, answer, "position"))
    return questions


# easy-VQA ------------------------------------------------------------------------------------------------------


def easy_vqa_train() -> list[EasyVqaEntry]:
    """The 4,000 training pictures with their (question, answer) pairs, 38,575 in all."""
    import easy_vqa

    return _by_picture(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())


def easy_vqa_test() -> list[EasyVqaEntry]:
    """The 1,000 test pictures with their (question, answer) pairs, 9,673 in all. Never trained on."""
    import easy_vqa

    return _by_picture(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())


def _by_picture(questions: tuple[list[str], list[str], list[int]], paths: dict[int, str]) -> list[EasyVqaEntry]:
    asked: dict[int, list[tuple[str, str]]] = {picture: [] for picture in sorted(paths)}
    for text, answer, picture in zip(*questions, strict=True):
        asked[picture].append((text, answer))
    return [(Path(paths[picture]), pairs) for picture, pairs in asked.items()]


def easy_vqa_item(pairs: list[tuple[str, str]]) -> Item | None:
    """The one shape in an easy-VQA picture, where its questions and answers give both colour and shape."""
    words = {word for text, answer in pairs if answer not in ("yes", "no") for word in [answer, *text.split()]}
    words = {word.strip("?") for word in words}
    colours, shapes = words & set(COLOUR_NAMES), words & set(SHAPE_NAMES)
    return Item(shapes.pop(), colours.pop(), (0, 0, 64, 64)) if len(colours) == len(shapes) == 1 else None


def easy_vqa_kind(answer: str) -> str:
    """easy-VQA has three kinds of answer: yes or no, a shape, a colour."""
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPE_NAMES else "colour"
