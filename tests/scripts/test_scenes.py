import re
from collections import Counter
from itertools import combinations

import pytest
from datasets import Image, List

from duostream.scripts.scenes import (
    CAPTION_PROMPTS,
    CHINESE_COLOURS,
    CHINESE_SHAPES,
    COLOURS,
    GERMAN_COLOURS,
    GERMAN_SHAPES,
    HELD_OUT_COMBINATIONS,
    PLACES,
    SHAPES,
    TEXT_PROMPTS,
    build_scenes,
    caption_rows,
    question_rows,
    to_conversations,
)

NUM_ROWS = 200
KINDS = {"colour", "shape", "count", "existence", "relation", "place"}
SPLITS = ("train", "validation", "combinations")
TEXT_COLUMNS = ("caption_en", "caption_de", "caption_zh", "description", "summary")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def splits(cache_dir):
    return {split: build_scenes(split, NUM_ROWS, cache_dir=cache_dir) for split in SPLITS}


@pytest.fixture(scope="module")
def rows(splits):
    return [row for split in splits.values() for row in split.remove_columns("image").to_list()]


@pytest.fixture(scope="module")
def many_questions(cache_dir):
    """The questions of enough scenes for a frequency, per split. The smallest pictures are the fastest."""
    return {
        split: [item for items in build_scenes(split, 2000, 32, cache_dir=cache_dir)["questions"] for item in items]
        for split in ("train", "combinations")
    }


def encoded_pictures(dataset):
    return [image["bytes"] for image in dataset.cast_column("image", Image(decode=False))["image"]]


def texts_of(row):
    return [row[name] for name in TEXT_COLUMNS] + [item["question"] for item in row["questions"]]


def combinations_of(row):
    return {(item["colour"], item["shape"]) for item in row["objects"]}


def text_of(message):
    return message["content"][-1]["text"]


def recompute_answer(question, objects):
    """Answer from the objects alone, by parsing the question."""

    def find(**attributes):
        return [item for item in objects if all(item[name] == value for name, value in attributes.items())]

    def find_named(name):
        colour, shape = name.split()
        (item,) = find(colour=colour, shape=shape)
        return item

    def find_at(phrase):
        (cell,) = (cell for cell, phrases in enumerate(PLACES.values()) if phrases[0] == phrase)
        (item,) = (item for item in objects if 3 * int(3 * item["y"]) + int(3 * item["x"]) == cell)
        return item

    if match := re.fullmatch(r"What color is the object (\w+ the [\w ]+)\?", question):
        return find_at(match[1])["colour"]
    if match := re.fullmatch(r"What shape is the object (\w+ the [\w ]+)\?", question):
        return find_at(match[1])["shape"]
    if match := re.fullmatch(r"What color is the (\w+)\?", question):
        (item,) = find(shape=match[1])
        return item["colour"]
    if match := re.fullmatch(r"What shape is the (\w+) object\?", question):
        (item,) = find(colour=match[1])
        return item["shape"]
    if question == "How many objects are there?":
        return str(len(objects))
    if match := re.fullmatch(r"How many (\w+) objects are there\?", question):
        return str(len(find(colour=match[1])))
    if match := re.fullmatch(r"How many (circle|square|triangle|cross)e?s are there\?", question):
        return str(len(find(shape=match[1])))
    if match := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        return "yes" if find(colour=match[1], shape=match[2]) else "no"
    if match := re.fullmatch(r"Where is the (\w+ \w+)\?", question):
        item = find_named(match[1])
        return list(PLACES)[3 * int(3 * item["y"]) + int(3 * item["x"])]
    relations = "left of|right of|above|below"
    match = re.fullmatch(rf"Is the (\w+ \w+) ({relations}) or ({relations}) the (\w+ \w+)\?", question)
    first, second = find_named(match[1]), find_named(match[4])
    assert {match[2], match[3]} in ({"left of", "right of"}, {"above", "below"})
    axis = "x" if "left of" in match.groups() else "y"
    difference = second[axis] - first[axis]
    assert abs(difference) >= 0.2
    before, after = ("left of", "right of") if axis == "x" else ("above", "below")
    return before if difference > 0 else after


@pytest.mark.parametrize("split", SPLITS)
def test_rows_depend_on_seed_split_and_index_only(split, splits, cache_dir, tmp_path):
    built = splits[split]
    again = build_scenes(split, 20, cache_dir=str(tmp_path))
    assert encoded_pictures(again) == encoded_pictures(built)[:20]
    assert again.remove_columns("image").to_list() == built.remove_columns("image").select(range(20)).to_list()
    other_seed = build_scenes(split, 20, seed=1, cache_dir=cache_dir)
    assert not set(encoded_pictures(other_seed)) & set(encoded_pictures(built))


def test_splits_share_no_picture(splits):
    pictures = [picture for split in splits.values() for picture in encoded_pictures(split)]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("image_size", [32, 96])
def test_image_size_changes_only_the_picture(image_size, splits, cache_dir):
    scaled = build_scenes("train", 5, image_size=image_size, cache_dir=cache_dir)
    assert {image.size for image in scaled["image"]} == {(image_size, image_size)}
    assert (
        scaled.remove_columns("image").to_list() == splits["train"].remove_columns("image").select(range(5)).to_list()
    )


def test_held_out_combinations_leave_every_colour_and_shape_in_training(splits):
    seen = set().union(*(combinations_of(row) for row in splits["train"].remove_columns("image")))
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_held_out_combinations_never_occur_in_training(split, splits):
    forbidden = [f"{colour} {shape}" for colour, shape in HELD_OUT_COMBINATIONS]
    forbidden += [
        f"{GERMAN_COLOURS[colour]}{ending} {noun}"
        for colour, shape in HELD_OUT_COMBINATIONS
        for noun, ending in [GERMAN_SHAPES[shape]]
    ]
    forbidden += [f"{CHINESE_COLOURS[colour]}色{CHINESE_SHAPES[shape]}" for colour, shape in HELD_OUT_COMBINATIONS]
    for row in splits[split].remove_columns("image"):
        assert not combinations_of(row) & set(HELD_OUT_COMBINATIONS)
        assert not any(name in text for name in forbidden for text in texts_of(row))
        assert not any(item["held_out"] for item in row["questions"])


def test_every_scene_of_combinations_has_a_held_out_combination(splits):
    for row in splits["combinations"].remove_columns("image"):
        assert combinations_of(row) & set(HELD_OUT_COMBINATIONS)


def test_held_out_marks_questions_about_held_out_combinations(splits):
    for row in splits["combinations"].remove_columns("image"):
        for item in row["questions"]:
            asked = re.sub(r"^What (color|shape) is the |\?$", "", item["question"])
            if item["kind"] in ("colour", "shape"):
                (about,) = (
                    thing
                    for thing in row["objects"]
                    if item["answer"] == thing[item["kind"]]
                    and asked in (thing["shape"], f"{thing['colour']} object", f"object {PLACES[thing['place']][0]}")
                )
                named = {(about["colour"], about["shape"])} & set(HELD_OUT_COMBINATIONS)
            else:
                named = {pair for pair in HELD_OUT_COMBINATIONS if " ".join(pair) in item["question"]}
            assert item["held_out"] == bool(named)


def test_answers_agree_with_the_objects(rows):
    for row in rows:
        for item in row["questions"]:
            assert item["answer"] == recompute_answer(item["question"], row["objects"])


def test_scenes_carry_the_kinds_they_admit(rows):
    for row in rows:
        kinds = Counter(item["kind"] for item in row["questions"])
        assert set(kinds) == (KINDS if len(row["objects"]) > 1 else KINDS - {"relation"})
        assert max(kinds.values()) == kinds["count"] == 2
        assert len({item["question"] for item in row["questions"]}) == len(row["questions"])


def test_absent_combinations_share_a_colour_or_shape_with_the_scene(rows):
    for row in rows:
        for item in row["questions"]:
            if item["kind"] == "existence" and item["answer"] == "no":
                colour, shape = item["question"].rstrip("?").split()[-2:]
                assert any(item["colour"] == colour or item["shape"] == shape for item in row["objects"])


@pytest.mark.parametrize("split", ["train", "combinations"])
def test_yes_and_no_are_balanced(split, many_questions):
    items = [item for item in many_questions[split] if item["kind"] == "existence"]
    for held_out in {item["held_out"] for item in items}:
        assert_balanced([item["answer"] == "yes" for item in items if item["held_out"] == held_out])


@pytest.mark.parametrize("split", ["train", "combinations"])
@pytest.mark.parametrize("opposites", [("left of", "right of"), ("above", "below")])
def test_relations_are_balanced_whichever_is_named_first(split, opposites, many_questions):
    items = [item for item in many_questions[split] if item["kind"] == "relation" and item["answer"] in opposites]
    assert_balanced([item["answer"] == opposites[0] for item in items])
    assert_balanced([item["question"].index(item["answer"]) < item["question"].index(" or ") for item in items])


def assert_balanced(outcomes):
    # Four standard deviations of a fair coin.
    assert abs(sum(outcomes) / len(outcomes) - 0.5) < 2 / len(outcomes) ** 0.5


def test_no_number_dominates_the_counts(many_questions):
    numbers = Counter(item["answer"] for item in many_questions["train"] if item["kind"] == "count")
    assert set(numbers) == {"0", "1", "2", "3"}
    assert max(numbers.values()) < 0.45 * numbers.total()
    assert min(numbers.values()) > 0.1 * numbers.total()


def test_objects_are_distinct_apart_and_inside_their_cells(rows):
    for row in rows:
        objects = row["objects"]
        assert 1 <= len(objects) <= 3
        assert len(combinations_of(row)) == len(objects)
        for item in objects:
            cell = list(PLACES).index(item["place"])
            assert abs(item["x"] - (cell % 3 + 0.5) / 3) + item["radius"] < 1 / 6
            assert abs(item["y"] - (cell // 3 + 0.5) / 3) + item["radius"] < 1 / 6
        for first, second in combinations(objects, 2):
            distance = max(abs(first[axis] - second[axis]) for axis in "xy")
            assert distance > first["radius"] + second["radius"]


def test_objects_are_painted_in_their_colours(splits):
    for row in splits["train"]:
        for item in row["objects"]:
            pixel = row["image"].getpixel((int(48 * item["x"]), int(48 * item["y"])))
            nearest = min(
                COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, COLOURS[name], strict=True))
            )
            assert nearest == item["colour"]


def test_captions_mention_every_object(rows):
    for row in rows:
        for item in row["objects"]:
            colour, shape = item["colour"], item["shape"]
            english, german, chinese = PLACES[item["place"]]
            noun, ending = GERMAN_SHAPES[shape]
            assert f"{item['size']} {colour} {shape} {english}" in row["caption_en"]
            assert f"{ending} {GERMAN_COLOURS[colour]}{ending} {noun} {german}" in row["caption_de"]
            assert re.search(
                f"{chinese}有一个[大小]的{CHINESE_COLOURS[colour]}色{CHINESE_SHAPES[shape]}", row["caption_zh"]
            )
            assert f"{colour} {shape}" in row["summary"]
            assert f"{colour} {shape}" in row["description"]


def test_texts_are_well_formed(rows):
    for row in rows:
        assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", text) for text in texts_of(row))
        assert re.match("A (small|large) ", row["caption_en"])
        assert re.match("Ein (kleine[rs]|große[rs]) ", row["caption_de"])
        assert 2 <= row["description"].count(".") <= 4
        assert row["summary"].count(".") == 1


@pytest.mark.parametrize("language", CAPTION_PROMPTS)
def test_conversations_keep_every_turn_once(language, splits):
    scenes = splits["train"]
    include = ("caption", "description", "summary", "questions")
    conversations = to_conversations(scenes, include=include, language=language)
    assert conversations.column_names == ["images", "messages"]
    for row, conversation in zip(scenes.remove_columns("image"), conversations.remove_columns("images"), strict=True):
        messages = conversation["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        expected = [(item["question"], item["answer"]) for item in row["questions"]]
        expected += [(prompt, row[name]) for name, prompt in TEXT_PROMPTS.items()]
        expected += [(CAPTION_PROMPTS[language], row[f"caption_{language}"])]
        texts = [text_of(message) for message in messages]
        assert sorted(zip(texts[::2], texts[1::2], strict=True)) == sorted(expected)


def test_conversations_have_the_picture_in_the_first_turn_only(splits):
    conversations = to_conversations(splits["train"])
    assert conversations.features["images"] == List(Image())
    for images, messages in zip(conversations["images"], conversations["messages"], strict=True):
        assert len(images) == 1
        types = [[part["type"] for part in message["content"]] for message in messages]
        assert types == [["image", "text"], *[["text"]] * (len(messages) - 1)]
    undecoded = conversations.cast_column("images", List(Image(decode=False)))["images"]
    assert [image["bytes"] for (image,) in undecoded] == encoded_pictures(splits["train"])


def test_conversations_are_shuffled_by_seed_and_cut(splits):
    scenes = splits["train"].select(range(50))
    messages = to_conversations(scenes)["messages"][:]
    assert to_conversations(scenes, seed=1)["messages"][:] != messages
    captions = [[text_of(message) for message in row].index(CAPTION_PROMPTS["en"]) for row in messages]
    assert len(set(captions)) > 3
    assert to_conversations(scenes, max_turns=2)["messages"][:] == [row[:4] for row in messages]


def test_question_rows_hold_one_question_each(splits):
    scenes = splits["combinations"].select(range(50))
    rows = question_rows(scenes)
    assert rows.features["images"] == List(Image())
    found = [
        (row["scene"], text_of(row["prompt"][0]), text_of(row["completion"][0]), row["kind"], row["held_out"])
        for row in rows
    ]
    assert found == [
        (index, item["question"], item["answer"], item["kind"], item["held_out"])
        for index, items in enumerate(scenes["questions"])
        for item in items
    ]
    assert rows[0]["prompt"][0]["content"][0] == {"type": "image", "text": None}
    assert rows[0]["images"][0].tobytes() == scenes[0]["image"].tobytes()


@pytest.mark.parametrize("language", CAPTION_PROMPTS)
def test_caption_rows_keep_the_objects(language, splits):
    scenes = splits["train"].select(range(10))
    rows = caption_rows(scenes, language)
    assert rows["objects"][:] == scenes["objects"][:]
    assert rows["scene"][:] == list(range(10))
    assert {text_of(prompt[0]) for prompt in rows["prompt"]} == {CAPTION_PROMPTS[language]}
    assert [text_of(completion[0]) for completion in rows["completion"]] == scenes[f"caption_{language}"][:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"`split` must be one of \['train', 'validation', 'combinations'\], got 'test'"),
        ({"split": "train", "num_rows": 0}, "`num_rows` must be at least 1, got 0"),
        ({"split": "train", "image_size": 31}, "`image_size` must be at least 32 pixels, got 31"),
    ],
)
def test_build_scenes_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_scenes(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_turns": 0}, "`max_turns` must be None or at least 1, got 0"),
        ({"include": ()}, "`include` must be a non-empty selection"),
        ({"include": ("captions",)}, "`include` must be a non-empty selection"),
        ({"language": "fr"}, "`language` must be one of .* got 'fr'"),
    ],
)
def test_to_conversations_refuses_bad_arguments(arguments, message, splits):
    with pytest.raises(ValueError, match=message):
        to_conversations(splits["train"], **arguments)


def test_caption_rows_refuses_an_unknown_language(splits):
    with pytest.raises(ValueError, match="`language` must be one of"):
        caption_rows(splits["train"], "fr")
