"""Scenes: a seeded, procedural picture-and-text data set of coloured shapes on a 3x3 grid.

Every row is a function of `(seed, split, index)` alone: a row does not change with the number of rows, and no two
splits or seeds share a random stream. The texts are derived from the objects that are painted, so answers are exact.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
from datasets import Dataset, Features, Image, List, NamedSplit, Value
from PIL import ImageDraw

Message = dict[str, Any]
Row = dict[str, Any]

COLOURS = {
    "red": (215, 35, 40),
    "green": (35, 155, 60),
    "blue": (40, 85, 225),
    "yellow": (245, 220, 35),
    "purple": (145, 45, 185),
    "orange": (245, 130, 20),
    "cyan": (40, 200, 215),
    "pink": (245, 120, 190),
}
COLOUR_JITTER = 12

# Corners in units of the object's radius, relative to its centre, y pointing down.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(math.cos(math.tau * k / 48), math.sin(math.tau * k / 48)) for k in range(48)],
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "cross": [
        *[(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36)],
        *[(0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)],
    ],
}
SHAPES = tuple(OUTLINES)

# Ranges of the radius, as a fraction of the picture's side, of which a cell of the grid has a third.
SIZES = {"small": (0.08, 0.097), "large": (0.13, 0.15)}
CELL_MARGIN = 0.008

# In reading order. Each place with its English, German and Chinese phrase.
PLACES = {
    "top left": ("in the top left", "oben links", "左上角"),
    "top center": ("at the top center", "oben in der Mitte", "上方中间"),
    "top right": ("in the top right", "oben rechts", "右上角"),
    "middle left": ("at the middle left", "links in der Mitte", "左侧中间"),
    "center": ("in the center", "genau in der Mitte", "正中间"),
    "middle right": ("at the middle right", "rechts in der Mitte", "右侧中间"),
    "bottom left": ("in the bottom left", "unten links", "左下角"),
    "bottom center": ("at the bottom center", "unten in der Mitte", "下方中间"),
    "bottom right": ("in the bottom right", "unten rechts", "右下角"),
}

# Ranges of the brightness. Objects stay visible on all three because they are saturated and the tints are not.
BACKGROUNDS = {"light": (212, 235), "gray": (115, 140), "dark": (28, 50)}
BACKGROUND_TINT = 14
MAX_NOISE = 0.06

# Never painted or named in training, where every colour and every shape still occurs with others.
HELD_OUT_COMBINATIONS = (("red", "square"), ("blue", "triangle"), ("yellow", "circle"), ("purple", "cross"))
ALL_COMBINATIONS = tuple(product(COLOURS, SHAPES))
TRAIN_COMBINATIONS = tuple(pair for pair in ALL_COMBINATIONS if pair not in HELD_OUT_COMBINATIONS)

# How often "combinations" asks about an absent held-out combination rather than another absent one, where it can. This
# balances the present ones; otherwise the mere name of a held-out combination would give away the answer "yes".
HELD_OUT_NEGATIVES = 0.75

DEFAULT_ROWS = {"train": 20_000, "validation": 500, "combinations": 500}
MIN_IMAGE_SIZE = 32
SUPERSAMPLING = 4

# Relative frequencies of scenes with 1, 2 and 3 objects.
NUMBER_WEIGHTS = {1: 1, 2: 2, 3: 2}
# Keeping the jitter small leaves objects of different rows or columns at least MIN_SEPARATION apart on that axis, and
# objects of the same row or column clearly closer than that.
MAX_SHIFT = 0.06
MIN_SEPARATION = 0.2
OPPOSITES = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

GERMAN_SIZES = {"small": "klein", "large": "groß"}
# "orangefarben" because "orange" takes no ending in standard German, nor do "türkis" and "rosa".
GERMAN_COLOURS = dict(
    zip(
        COLOURS,
        ("rot", "grün", "blau", "gelb", "violett", "orangefarben", "türkisfarben", "rosafarben"),
        strict=True,
    )
)
# Each noun with the ending of an adjective between "ein" and the noun.
GERMAN_SHAPES = dict(
    zip(SHAPES, (("Kreis", "er"), ("Quadrat", "es"), ("Dreieck", "es"), ("Kreuz", "es")), strict=True)
)
CHINESE_SIZES = {"small": "小", "large": "大"}
CHINESE_COLOURS = dict(zip(COLOURS, "红绿蓝黄紫橙青粉", strict=True))
CHINESE_SHAPES = dict(zip(SHAPES, ("圆形", "正方形", "三角形", "十字形"), strict=True))

CAPTION_PROMPTS = {"en": "Describe the picture.", "de": "Beschreibe das Bild.", "zh": "描述这张图片。"}
TEXT_PROMPTS = {"description": "Describe the picture in detail.", "summary": "Summarize the picture in one sentence."}
TURN_SOURCES = ("caption", *TEXT_PROMPTS, "questions")

TEXT = Value("string")
OBJECT_FEATURES = List(
    {
        **dict.fromkeys(("shape", "colour", "size", "place"), TEXT),
        **dict.fromkeys(("x", "y", "radius"), Value("float32")),
    }
)
SCENE_FEATURES = Features(
    {
        "image": Image(),
        "objects": OBJECT_FEATURES,
        **dict.fromkeys(("caption_en", "caption_de", "caption_zh", "description", "summary"), TEXT),
        "questions": List({"question": TEXT, "answer": TEXT, "kind": TEXT, "held_out": Value("bool")}),
    }
)
MESSAGES_FEATURE = List({"role": TEXT, "content": List({"type": TEXT, "text": TEXT})})
PROMPT_FEATURES = {
    "images": List(Image()),
    "prompt": MESSAGES_FEATURE,
    "completion": MESSAGES_FEATURE,
    "scene": Value("int32"),
}

# Part of the cache's key. `datasets` hashes an importable function by its name alone, so that without this the cache
# would go on serving the old scenes after an edit of this file.
SOURCE_DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


class SceneObject(NamedTuple):
    """A painted object. `x`, `y` (its centre) and `radius` are fractions of the picture's side, y pointing down."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape, which identify the object in its scene."""
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        """Whether training never shows this colour and shape together."""
        return (self.colour, self.shape) in HELD_OUT_COMBINATIONS


class Question(NamedTuple):
    """A question with its answer. `held_out` tells whether it is about an object of a held-out combination."""

    question: str
    answer: str
    kind: str
    held_out: bool = False


def build_scenes(
    split: str, num_rows: int | None = None, image_size: int = 48, seed: int = 0, cache_dir: str | None = None
) -> Dataset:
    """Build a split of the data set, or load it from the cache of `datasets`.

    Args:
        split: "train"; "validation", new scenes of the same colour-shape combinations; or "combinations", where every
            scene has at least one object of HELD_OUT_COMBINATIONS.
        num_rows: Number of scenes. Default: 20,000 for "train", 500 for the others.
        image_size: Side of the square pictures in pixels, at least 32. The scenes are the same at every size.
        seed: Seed of the scenes.
        cache_dir: Folder of the cache. Default: the one of `datasets`.

    Returns:
        A data set with the columns of SCENE_FEATURES. Objects are in reading order.

    Raises:
        ValueError: On an unknown split, `num_rows` below 1 or `image_size` below 32.
    """
    if split not in DEFAULT_ROWS:
        raise ValueError(f"`split` must be one of {list(DEFAULT_ROWS)}, got {split!r}")
    num_rows = DEFAULT_ROWS[split] if num_rows is None else num_rows
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, got {num_rows}")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"`image_size` must be at least {MIN_IMAGE_SIZE} pixels, got {image_size}")
    return Dataset.from_generator(
        _generate_rows,
        features=SCENE_FEATURES,
        cache_dir=cache_dir,
        gen_kwargs={
            "split": split,
            "num_rows": num_rows,
            "image_size": image_size,
            "seed": seed,
            "source_digest": SOURCE_DIGEST,
        },
        split=NamedSplit(split),
    )


def to_conversations(
    dataset: Dataset,
    max_turns: int | None = None,
    seed: int = 0,
    include: Sequence[str] = ("caption", "description", "questions"),
    language: str = "en",
) -> Dataset:
    """Turn every scene into one conversation about its picture, in the form that `apply_chat_template` and TRL read.

    Args:
        dataset: A data set of `build_scenes`.
        max_turns: Most pairs of a user and an assistant message to keep per scene, at least 1. Default: all.
        seed: Seed of the order of the turns: the questions in random order, then the texts in random order.
        include: What to ask for, out of "caption", "description", "summary" and "questions". A summary is left out by
            default because it repeats the description.
        language: Language of the caption's turn: "en", "de" or "zh". The other turns are in English.

    Returns:
        A data set with the columns `images`, a list with the one picture, and `messages`, whose first user message
        starts with the image part.

    Raises:
        ValueError: If `max_turns` is below 1, `include` is empty or has an unknown name, or `language` is unknown.
    """
    if max_turns is not None and max_turns < 1:
        raise ValueError(f"`max_turns` must be None or at least 1, got {max_turns}")
    if not include or not set(include) <= set(TURN_SOURCES):
        raise ValueError(f"`include` must be a non-empty selection of {list(TURN_SOURCES)}, got {include!r}")
    _check_language(language)
    return _map_rows(
        dataset,
        _conversation,
        {"images": List(Image()), "messages": MESSAGES_FEATURE},
        max_turns=max_turns,
        seed=seed,
        include=tuple(include),
        language=language,
    )


def question_rows(dataset: Dataset) -> Dataset:
    """Spread the scenes into one prompt-completion row per question.

    Args:
        dataset: A data set of `build_scenes`.

    Returns:
        A data set with the columns `images`, `prompt` and `completion` (lists of messages), `scene`, the number of the
        scene's row in `dataset`, `kind` and `held_out`.
    """
    features = {**PROMPT_FEATURES, "kind": TEXT, "held_out": Value("bool")}
    return _map_rows(dataset, _question_rows, features)


def caption_rows(dataset: Dataset, language: str = "en") -> Dataset:
    """Turn every scene into a prompt-completion row that asks for its caption.

    Args:
        dataset: A data set of `build_scenes`.
        language: Language of prompt and caption: "en", "de" or "zh".

    Returns:
        A data set with the columns `images`, `prompt` and `completion` (lists of messages), `scene`, the number of the
        scene's row in `dataset`, and `objects`, against which a scorer can check colours and shapes.

    Raises:
        ValueError: If `language` is unknown.
    """
    _check_language(language)
    features = {**PROMPT_FEATURES, "objects": OBJECT_FEATURES}
    return _map_rows(dataset, _caption_row, features, language=language)


def training_rows(dataset: Dataset) -> Dataset:
    """Turn every scene into a row for each question and one for the English caption.

    A model learns to pick out the object that is asked for many times sooner than with several turns to a row, where
    an answer has the other questions before it, too.

    Args:
        dataset: A data set of `build_scenes`.

    Returns:
        A data set with the columns `images`, `prompt` and `completion` (lists of messages), `scene`, the number of the
        scene's row in `dataset`, and `length`: 1 for captions, the longer rows, and 0 for questions of all kinds. With
        `--train_sampling_strategy group_by_length` neither pads the other.
    """
    return _map_rows(dataset, _training_rows, {**PROMPT_FEATURES, "length": Value("int64")})


def _generate_rows(split: str, num_rows: int, image_size: int, seed: int, source_digest: str) -> Iterator[Row]:
    """Yield the rows of a split. `source_digest` only serves the cache's key."""
    for index in range(num_rows):
        yield _sample_row(random.Random(f"{seed}/{split}/{index}"), split, image_size)


def _sample_row(rng: random.Random, split: str, image_size: int) -> Row:
    objects = _sample_objects(rng, split)
    background = rng.choice(list(BACKGROUNDS))
    questions = _sample_questions(rng, objects, split)
    return {
        "image": {"bytes": _encode(_paint(rng, objects, background, image_size)), "path": None},
        "objects": [item._asdict() for item in objects],
        "caption_en": _caption_en(objects),
        "caption_de": _caption_de(objects),
        "caption_zh": _caption_zh(objects),
        "description": _describe(objects, background),
        "summary": _summarize(objects, background),
        "questions": [question._asdict() for question in questions],
    }


def _sample_objects(rng: random.Random, split: str) -> list[SceneObject]:
    number = rng.choices(list(NUMBER_WEIGHTS), list(NUMBER_WEIGHTS.values()))[0]
    cells = sorted(rng.sample(range(len(PLACES)), number))
    combinations = _sample_combinations(rng, split, number)
    return [_sample_object(rng, cell, pair) for cell, pair in zip(cells, combinations, strict=True)]


def _sample_combinations(rng: random.Random, split: str, number: int) -> list[tuple[str, str]]:
    pool = ALL_COMBINATIONS if split == "combinations" else TRAIN_COMBINATIONS
    first = rng.choice(HELD_OUT_COMBINATIONS if split == "combinations" else pool)
    # Half of the scenes share a colour or a shape: otherwise there would hardly ever be three of a kind to count.
    shared = rng.choice((None, None, 0, 1))
    others = [pair for pair in pool if pair != first and (shared is None or pair[shared] == first[shared])]
    return rng.sample([first, *rng.sample(others, number - 1)], number)


def _sample_object(rng: random.Random, cell: int, combination: tuple[str, str]) -> SceneObject:
    row, column = divmod(cell, 3)
    colour, shape = combination
    size = rng.choice(list(SIZES))
    radius = rng.uniform(*SIZES[size])
    shift = min(MAX_SHIFT, 1 / 6 - CELL_MARGIN - radius)
    x = (column + 0.5) / 3 + rng.uniform(-shift, shift)
    y = (row + 0.5) / 3 + rng.uniform(-shift, shift)
    return SceneObject(shape, colour, size, list(PLACES)[cell], x, y, radius)


def _paint(rng: random.Random, objects: list[SceneObject], background: str, image_size: int) -> PIL.Image.Image:
    picture = _paint_background(rng, background, image_size)
    side = image_size * SUPERSAMPLING
    for item in objects:
        corners = [
            (side * (item.x + item.radius * u), side * (item.y + item.radius * v)) for u, v in OUTLINES[item.shape]
        ]
        mask = PIL.Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        picture.paste(_jitter(rng, COLOURS[item.colour], COLOUR_JITTER), mask=mask.reduce(SUPERSAMPLING))
    return picture


def _paint_background(rng: random.Random, background: str, image_size: int) -> PIL.Image.Image:
    """Paint a gradient between similar tints in the four corners, with some gray noise."""
    gray = (rng.randint(*BACKGROUNDS[background]),) * 3
    corners = PIL.Image.new("RGB", (2, 2))
    corners.putdata([_jitter(rng, gray, BACKGROUND_TINT) for _ in range(4)])
    size = (image_size, image_size)
    # The box goes from pixel centre to pixel centre: beyond, bilinear resizing would leave flat margins.
    gradient = corners.resize(size, PIL.Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    # A generator of its own, so that `rng` continues the same at every image size.
    noise = PIL.Image.frombytes("L", size, random.Random(rng.random()).randbytes(image_size**2))
    return PIL.Image.blend(gradient, noise.convert("RGB"), rng.uniform(0, MAX_NOISE))


def _jitter(rng: random.Random, colour: tuple[int, ...], amount: int) -> tuple[int, ...]:
    return tuple(min(max(channel + rng.randint(-amount, amount), 0), 255) for channel in colour)


def _encode(picture: PIL.Image.Image) -> bytes:
    buffer = BytesIO()
    # Noise hardly compresses, so a higher level would only cost time.
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _sample_questions(rng: random.Random, objects: list[SceneObject], split: str) -> list[Question]:
    questions = [*_sample_count_questions(rng, objects), _sample_existence_question(rng, objects, split)]
    for ask_all, number in QUESTIONS_PER_KIND.items():
        candidates = ask_all(objects)
        questions += rng.sample(candidates, min(len(candidates), number))
    return questions


def _sample_count_questions(rng: random.Random, objects: list[SceneObject]) -> list[Question]:
    numbers = {"How many objects are there?": len(objects)}
    for shape in SHAPES:
        plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
        numbers[f"How many {plural} are there?"] = sum(item.shape == shape for item in objects)
    for colour in COLOURS:
        numbers[f"How many {colour} objects are there?"] = sum(item.colour == colour for item in objects)
    questions = []
    for _ in range(COUNT_QUESTIONS):
        # The answer first, as most questions have the answer 0; the weights, as few scenes have a high one
        answers = sorted(set(numbers.values()))
        answer = rng.choices(answers, [number + 1 for number in answers])[0]
        question = rng.choice([question for question, number in numbers.items() if number == answer])
        questions.append(Question(question, str(numbers.pop(question)), "count"))
    return questions


def _sample_existence_question(rng: random.Random, objects: list[SceneObject], split: str) -> Question:
    present = [(item.colour, item.shape) for item in objects]
    answer = rng.choice(("yes", "no"))
    colour, shape = rng.choice(present) if answer == "yes" else _sample_hard_negative(rng, present, split)
    held_out = (colour, shape) in HELD_OUT_COMBINATIONS
    return Question(f"Is there {_with_article(f'{colour} {shape}')}?", answer, "existence", held_out)


def _sample_hard_negative(rng: random.Random, present: list[tuple[str, str]], split: str) -> tuple[str, str]:
    """Sample an absent combination whose colour or shape is present."""
    colours, shapes = ({pair[part] for pair in present} for part in (0, 1))
    absent = [pair for pair in ALL_COMBINATIONS if pair not in present and (pair[0] in colours or pair[1] in shapes)]
    held_out = [pair for pair in absent if pair in HELD_OUT_COMBINATIONS]
    if split == "combinations" and held_out and rng.random() < HELD_OUT_NEGATIVES:
        return rng.choice(held_out)
    return rng.choice([pair for pair in absent if pair in TRAIN_COMBINATIONS])


def _colour_questions(objects: list[SceneObject]) -> list[Question]:
    """Ask by place, and by shape where only one object has it."""
    shapes = [item.shape for item in objects]
    return [
        Question(f"What color is the {reference}?", item.colour, "colour", item.held_out)
        for item in objects
        for reference in [_by_place(item)] + [item.shape] * (shapes.count(item.shape) == 1)
    ]


def _shape_questions(objects: list[SceneObject]) -> list[Question]:
    """Ask by place, and by colour where only one object has it."""
    colours = [item.colour for item in objects]
    return [
        Question(f"What shape is the {reference}?", item.shape, "shape", item.held_out)
        for item in objects
        for reference in [_by_place(item)] + [f"{item.colour} object"] * (colours.count(item.colour) == 1)
    ]


def _by_place(item: SceneObject) -> str:
    return f"object {PLACES[item.place][0]}"


def _place_questions(objects: list[SceneObject]) -> list[Question]:
    return [Question(f"Where is the {item.name}?", item.place, "place", item.held_out) for item in objects]


def _relation_questions(objects: list[SceneObject]) -> list[Question]:
    """Ask which of two opposites holds. Either comes first in half of the questions, and is the answer in half."""
    return [
        Question(f"Is the {a.name} {one} or {other} the {b.name}?", relation, "relation", a.held_out or b.held_out)
        for a, b in permutations(objects, 2)
        for relation in _relations(a, b)
        for one, other in permutations((relation, OPPOSITES[relation]))
    ]


def _relations(first: SceneObject, second: SceneObject) -> list[str]:
    """Tell how the first object lies relative to the second, on the axes where their centres are clearly apart."""
    relations = []
    if abs(first.y - second.y) >= MIN_SEPARATION:
        relations.append("above" if first.y < second.y else "below")
    if abs(first.x - second.x) >= MIN_SEPARATION:
        relations.append("left of" if first.x < second.x else "right of")
    return relations


# How many there are, where something is, and how it lies to another thing, takes longest to learn.
COUNT_QUESTIONS = 2
QUESTIONS_PER_KIND: dict[Callable[[list[SceneObject]], list[Question]], int] = {
    _colour_questions: 1,
    _shape_questions: 1,
    _place_questions: 2,
    _relation_questions: 2,
}


def _caption_en(objects: list[SceneObject]) -> str:
    text = _join([f"a {item.size} {item.name} {PLACES[item.place][0]}" for item in objects])
    return f"A{text[1:]}."


def _caption_de(objects: list[SceneObject]) -> str:
    parts = []
    for item in objects:
        noun, ending = GERMAN_SHAPES[item.shape]
        adjectives = f"{GERMAN_SIZES[item.size]}{ending} {GERMAN_COLOURS[item.colour]}{ending}"
        parts.append(f"ein {adjectives} {noun} {PLACES[item.place][1]}")
    text = _join(parts, conjunction="und", serial_comma=False)
    return f"E{text[1:]}."


def _caption_zh(objects: list[SceneObject]) -> str:
    parts = []
    for item in objects:
        adjectives = f"{CHINESE_SIZES[item.size]}的{CHINESE_COLOURS[item.colour]}色"
        parts.append(f"{PLACES[item.place][2]}有一个{adjectives}{CHINESE_SHAPES[item.shape]}")
    return f"{'，'.join(parts)}。"


def _describe(objects: list[SceneObject], background: str) -> str:
    number = ("one object", "two objects", "three objects")[len(objects) - 1]
    sentences = [
        f"The picture shows {number} on a {background} background.",
        f"There is a{_caption_en(objects)[1:]}",
        *(f"The {a.name} is {' and '.join(_relations(a, b))} the {b.name}." for a, b in pairwise(objects)),
    ]
    return " ".join(sentences)


def _summarize(objects: list[SceneObject], background: str) -> str:
    return f"The picture shows {_join([_with_article(item.name) for item in objects])} on a {background} background."


def _join(parts: list[str], conjunction: str = "and", serial_comma: bool = True) -> str:
    if len(parts) == 1:
        return parts[0]
    comma = "," if serial_comma and len(parts) > 2 else ""
    return f"{', '.join(parts[:-1])}{comma} {conjunction} {parts[-1]}"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _check_language(language: str) -> None:
    if language not in CAPTION_PROMPTS:
        raise ValueError(f"`language` must be one of {list(CAPTION_PROMPTS)}, got {language!r}")


def _map_rows(
    dataset: Dataset, make_rows: Callable[..., list[Row]], features: dict[str, Any], **kwargs: Any
) -> Dataset:
    """Replace every row by those that `make_rows(row, index, **kwargs)` makes of it.

    The pictures are passed on encoded: decoding them, to encode them again, would take most of the time.
    """
    return dataset.cast_column("image", Image(decode=False)).map(
        _map_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={"make_rows": make_rows, "columns": list(features), **kwargs},
        remove_columns=dataset.column_names,
        features=Features(features),
    )


def rows_of_batch(batch: dict[str, list]) -> list[Row]:
    """Rows of a batch as `datasets` gives it, column by column."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _map_batch(
    batch: dict[str, list], indices: list[int], make_rows: Callable[..., list[Row]], columns: list[str], **kwargs: Any
) -> dict[str, list]:
    old_rows = zip(rows_of_batch(batch), indices, strict=True)
    rows = [row for old, index in old_rows for row in make_rows(old, index, **kwargs)]
    return {name: [row[name] for row in rows] for name in columns}


def _conversation(
    row: Row, index: int, max_turns: int | None, seed: int, include: tuple[str, ...], language: str
) -> list[Row]:
    rng = random.Random(f"{seed}/turns/{index}")
    turns = [(item["question"], item["answer"]) for item in row["questions"]] if "questions" in include else []
    texts = [(prompt, row[name]) for name, prompt in TEXT_PROMPTS.items() if name in include]
    if "caption" in include:
        texts.append((CAPTION_PROMPTS[language], row[f"caption_{language}"]))
    rng.shuffle(turns)
    rng.shuffle(texts)
    # Texts come last. Questions that followed one would be answered from it, and not from the picture.
    turns += texts
    return [{"images": [row["image"]], "messages": _messages(turns[:max_turns])}]


def _question_rows(row: Row, index: int) -> list[Row]:
    return [
        {
            **_prompt_row(row, index, item["question"], item["answer"]),
            "kind": item["kind"],
            "held_out": item["held_out"],
        }
        for item in row["questions"]
    ]


def _caption_row(row: Row, index: int, language: str) -> list[Row]:
    prompt_row = _prompt_row(row, index, CAPTION_PROMPTS[language], row[f"caption_{language}"])
    return [{**prompt_row, "objects": row["objects"]}]


def _training_rows(row: Row, index: int) -> list[Row]:
    questions = [{**question, "length": 0} for question in _question_rows(row, index)]
    return questions + [{**caption, "length": 1} for caption in _caption_row(row, index, "en")]


def _prompt_row(row: Row, index: int, prompt: str, completion: str) -> Row:
    user, assistant = _messages([(prompt, completion)])
    return {"images": [row["image"]], "prompt": [user], "completion": [assistant], "scene": index}


def _messages(turns: list[tuple[str, str]]) -> list[Message]:
    """Build a conversation from pairs of a user's and an assistant's text, with the picture at its start.

    Every part has both keys because all parts of a data set share one schema.
    """
    messages: list[Message] = []
    for texts in turns:
        for role, text in zip(("user", "assistant"), texts, strict=True):
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    messages[0]["content"].insert(0, {"type": "image", "text": None})
    return messages
