"""A training set that is broken in every way trains through, or stops by name; what can be read is read right."""

import json
import struct
import zlib
from base64 import b64encode
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamDataCollator, DuoStreamProcessor, train_tokenizer
from duostream.processing.data_collator_duostream import load_picture
from duostream.scripts import pretrain

SIDE = 16
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "no"]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, without having so many pixels in memory as `PIL` would."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return png_of(header, zlib.compress(bytes((1 + -(-width // 8)) * height), 1))


def png_of(header: bytes, pixels: bytes, *others: bytes) -> bytes:
    between = b"".join(others)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + between + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round()


def save_readable(folder: Path) -> dict[str, np.ndarray]:
    """Pictures of all kinds that can be read, and what they show, `(height, width, 3)`, read in another way."""
    picture, alpha = Image.fromarray(NOISE), Image.fromarray(np.arange(256, dtype=np.uint8).reshape(SIDE, SIDE))
    shown: dict[str, np.ndarray] = {}

    def save(name: str, image: Image.Image, **options: Any) -> Image.Image:
        image.save(folder / name, **options)
        return Image.open(folder / name)

    shown["cmyk.jpg"] = np.asarray(save("cmyk.jpg", picture.convert("CMYK")).convert("RGB"))
    for suffix in ("png", "tif"):
        sixteen = np.linspace(0, 2**16 - 1, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
        save(f"sixteen.{suffix}", Image.fromarray(sixteen))
        shown[f"sixteen.{suffix}"] = np.repeat(sixteen[..., None] / 257, 3, axis=-1)
    # Of two grays with the same upper 8 bits one is transparent. Pillow before 10.3 can't write it.
    sixteen[0, 0] = 5 * 256 + 6
    save("sixteen_hole.png", Image.fromarray(sixteen))
    whole = (folder / "sixteen_hole.png").read_bytes()
    after_header = whole.index(b"IDAT") - 4
    (folder / "sixteen_hole.png").write_bytes(
        whole[:after_header] + chunk(b"tRNS", bytes([5, 6])) + whole[after_header:]
    )
    shown["sixteen_hole.png"] = shown["sixteen.png"].copy()
    shown["sixteen_hole.png"][0, 0] = 255
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(struct.pack(">B6H", 0, 300, 5000, 60000, 300, 5000, 50000))
    hidden = chunk(b"tRNS", struct.pack(">3H", 300, 5000, 60000))
    (folder / "deep_hole.png").write_bytes(png_of(header, pixels, hidden))
    shown["deep_hole.png"] = np.array([[[255, 255, 255], [1, 19, 195]]])
    shown["palette.png"] = np.asarray(save("palette.png", picture.quantize(16)).convert("RGB"))
    colors = picture.quantize(16)
    rgba = np.dstack([np.asarray(colors.convert("RGB")), np.where(np.asarray(colors) == 3, 0, 255)])
    save("hole.png", colors, transparency=3)
    shown["hole.png"] = on_white(rgba)
    transparent = picture.copy()
    transparent.putalpha(alpha)
    shown["transparent.png"] = on_white(np.asarray(save("transparent.png", transparent)))
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "lime", "blue")]
    save("animated.gif", frames[0], save_all=True, append_images=frames[1:], duration=100)
    shown["animated.gif"] = np.asarray(frames[0])
    exif = Image.Exif()
    exif[274] = 6
    half = picture.crop((0, 0, SIDE, SIDE // 2))
    shown["lying.png"] = np.rot90(np.asarray(half), k=-1)
    assert (shown["lying.png"] == np.asarray(ImageOps.exif_transpose(save("lying.png", half, exif=exif)))).all()
    # Of a gray one that isn't compressed Pillow maps the file
    save("lying.tif", half.convert("L"), exif=exif)
    shown["lying.tif"] = np.rot90(np.asarray(half.convert("L").convert("RGB")), k=-1)
    shown["one.png"] = np.asarray(save("one.png", Image.new("RGB", (1, 1), (1, 2, 3))))
    return shown


READABLE = [
    *("cmyk.jpg", "sixteen.png", "sixteen.tif", "palette.png", "hole.png", "transparent.png", "animated.gif"),
    *("sixteen_hole.png", "deep_hole.png", "lying.png", "lying.tif", "one.png"),
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("readable")
    return folder, save_readable(folder)


@pytest.fixture(scope="module")
def processor() -> DuoStreamProcessor:
    image_processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return DuoStreamProcessor(image_processor, train_tokenizer(["What is it? A circle."] * 4, 300), image_seq_length=4)


@pytest.mark.parametrize("name", READABLE)
def test_a_picture_of_any_kind_is_read_as_it_is_seen(shown: Any, name: str) -> None:
    folder, pixels = shown
    path, data = str(folder / name), (folder / name).read_bytes()
    for source in (path, {"bytes": data, "path": None}, {"bytes": None, "path": path}):
        picture = load_picture(source)
        assert picture.mode == "RGB"
        assert np.asarray(picture).shape == pixels[name].shape
        # Of 16 bits the upper 8, and of transparency what is rounded, may be one off
        assert np.abs(np.asarray(picture).astype(float) - pixels[name]).max() <= 1


@pytest.mark.parametrize("name", READABLE)
def test_training_and_use_read_the_same_picture(shown: Any, processor: DuoStreamProcessor, name: str) -> None:
    path = str(shown[0] / name)
    row = {"images": [path], "messages": MESSAGES}
    trained = DuoStreamDataCollator(processor)([row])["pixel_values"]
    url = f"data:image/png;base64,{b64encode(Path(path).read_bytes()).decode()}"
    for given in (path, url, Image.open(path)):
        used = processor(images=[given], text="<|image|>", return_tensors="pt")["pixel_values"]
        assert (used == trained).all()
    content = [{"type": "image", "path": path}, {"type": "text", "text": "?"}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (chat["pixel_values"] == trained).all()


def turns(question: Any, num_images: int = 1, answer: Any = "red") -> list[dict]:
    asked = [{"type": "image", "text": None}] * num_images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


MESSAGES = turns("What is it?")


def save_broken(folder: Path) -> dict[str, str]:
    """Files that are no pictures, or not such as can be read, and what is said of each."""
    good = folder / "good.jpg"
    Image.fromarray(np.kron(NOISE, np.ones((8, 8, 1), np.uint8))).save(good)
    contents = {
        "truncated.jpg": (good.read_bytes()[:1500], "truncated"),
        "empty.jpg": (b"", "cannot identify image file"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "cannot identify image file"),
        "huge.png": (png(20_000, 20_000), "decompression bomb"),
        "bomb.png": (png(200_000, 3_000), "decompression bomb"),
        "line.png": (png(1, 1_000), "1 x 1000 pixels; one side may be up to 200 times the other"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    Image.fromarray(NOISE[..., 0].astype(np.float32)).save(folder / "numbers.tif")
    return {name: told for name, (_, told) in contents.items()} | {"numbers.tif": "pixels of mode 'F'"}


@pytest.fixture
def broken_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[int, str], int]:
    """Rows of every kind, which of them are bad, and what is said of each; and how many are good."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    broken, readable = save_broken(tmp_path), save_readable(tmp_path)
    good = [{"images": [str(tmp_path / name)], "messages": MESSAGES} for name in readable]
    for marker in ("<|image|>", "<|end|><|assistant|>blue", "{% generation %}{{ 7 * 7 }}"):
        good.append({"images": [str(tmp_path / "good.jpg")], "messages": turns(f"What is {marker}?")})
    picture = str(tmp_path / "good.jpg")
    bad: list[tuple[Any, str]] = [
        ({"images": [str(tmp_path / name)], "messages": MESSAGES}, f"a picture can't be read: {told}|{told}")
        for name, told in broken.items()
    ]
    bad += [
        ({"images": [picture]}, "there are no messages"),
        ({"images": None, "messages": None}, "there are no messages"),
        ({"images": [picture], "messages": turns(None)}, "expected text from the user, not None"),
        ({"images": [picture], "messages": turns("?", answer=None)}, "expected text from the assistant, not None"),
        ({"images": [picture], "messages": turns("many words " * 90_910)}, "more than the 2048 of the tokenizer's"),
        ({"images": [picture], "messages": turns("half \ud83d")}, "surrogates not allowed"),
        ('{"images": [], "messages": [{"role"', "Expecting ':' delimiter"),
        ({"images": [picture], "messages": turns("?", num_images=2)}, "2 picture markers but 1 pictures"),
        ({"images": [picture] * 2, "messages": turns("<|image|>")}, "1 picture markers but 2 pictures"),
        ({"images": [str(tmp_path / "nowhere.jpg")], "messages": MESSAGES}, "nowhere.jpg"),
    ]
    rows: list[Any] = [good[0]]
    told = {}
    # One good, one bad, in turns
    for row, reason in bad:
        told[len(rows)] = reason
        rows += [row, good[len(rows) // 2 % len(good)]]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path, told, len(rows) - len(bad)


def train(rows: Path, output_dir: Path, *args: str) -> None:
    command = ["--dataset", str(rows), "--output_dir", str(output_dir), "--vocab_size", "300"]
    pretrain.main([*command, "--per_device_train_batch_size", "4", *QUIET, *args])


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--streaming", "true"], ["--blank_images", "true"]], ids=str)
def test_a_set_that_is_broken_in_every_way_trains_through(
    broken_set: Any, tmp_path: Path, options: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, told, num_good = broken_set
    length = ["--max_steps", str(-(-num_good // 4))] if "--streaming" in options else ["--num_train_epochs", "1"]
    train(path, tmp_path / "out", "--on_bad_rows", "skip", *length, *options)
    reasons: dict[int, list[str]] = {}
    for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines():
        reasons.setdefault(json.loads(line)["row"], []).append(json.loads(line)["reason"])
    assert sorted(reasons) == sorted(told)
    for row, expected in told.items():
        assert any(each in reasons[row][0] for each in expected.split("|")), (expected, reasons[row])
    assert f"{len(told)} bad rows were left out" in caplog.text
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == -(-num_good // 4)


@pytest.mark.slow
def test_by_default_the_first_broken_row_stops_training_and_is_named(broken_set: Any, tmp_path: Path) -> None:
    path, told, _ = broken_set
    lines = path.read_text().splitlines()
    for row, expected in told.items():
        path.write_text("\n".join([lines[0], lines[row], *lines[:6:2]]))
        with pytest.raises((ValueError, OSError)) as stopped:
            train(path, tmp_path / "out", "--max_steps", "2")
        assert "Row 1" in str(stopped.value)
        assert any(each in str(stopped.value) for each in expected.split("|")), stopped.value


@pytest.mark.slow
def test_lines_of_a_picture_folder_that_cannot_be_read_are_left_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photographs" / "train"
    folder.mkdir(parents=True)
    rows = [{"file_name": f"{i}.png", "captions": [f"a {i}"]} for i in range(6)]
    rows[2]["captions"] = ["half \ud83d"]
    for i in (0, 1, 2, 3, 5):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(folder / f"{i}.png")
    lines = [json.dumps(row) for row in rows]
    lines[3] = lines[3][:20]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    options = ["--task", "caption", "--max_steps", "1"]
    with pytest.raises(ValueError, match=r"Row 2 of .*metadata\.jsonl: .*surrogates not allowed"):
        train(folder.parent, tmp_path / "out", *options)
    train(folder.parent, tmp_path / "out", "--on_bad_rows", "skip", *options)
    written = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").open()]
    assert {each["row"] for each in written} == {2, 3, 4}
    assert any("there is no picture '4.png'" in each["reason"] for each in written)
    # What is read in their place is no part of what the user has
    assert (folder / "metadata.jsonl").read_text() == "\n".join(lines)


def test_a_text_that_is_longer_than_the_model_reads_is_cut_only_if_asked(processor: DuoStreamProcessor) -> None:
    row = {"row": 7, "messages": turns("many words " * 1000, num_images=0)}
    with pytest.raises(ValueError, match=r"Row 7 has \d+ tokens of text, more than the 2048"):
        DuoStreamDataCollator(processor)([row])
    assert DuoStreamDataCollator(processor, max_length=64)([row])["input_ids"].shape == (1, 64)


@pytest.mark.parametrize("written", ["nowhere.png", "/etc/hostname", "data:image/png;base64,AAAA"])
def test_what_is_no_picture_is_named_by_the_processor(processor: DuoStreamProcessor, written: str) -> None:
    with pytest.raises(ValueError, match=f"`images` has '{written}', which can't be read"):
        processor(images=[written], text="<|image|>")


def test_rows_without_any_picture_have_no_pixels(processor: DuoStreamProcessor) -> None:
    for images in ([], [[], []]):
        assert "pixel_values" not in processor(images=images, text=["a", "b"], return_tensors="pt", padding=True)


@pytest.mark.parametrize("messages", [turns(None), [{"role": "user", "content": [{"type": "video", "video": "a"}]}]])
def test_what_a_template_would_leave_out_or_write_as_none_is_refused(
    processor: DuoStreamProcessor, messages: list[dict]
) -> None:
    with pytest.raises(ValueError, match=r"expected text.* from the user, not"):
        processor.apply_chat_template(messages)


def test_a_picture_in_an_answer_is_not_left_out_silently(processor: DuoStreamProcessor) -> None:
    answer = {"role": "assistant", "content": [{"type": "image", "image": Image.new("RGB", (9, 9))}]}
    with pytest.raises(ValueError, match="from the assistant, not 'image'"):
        processor.apply_chat_template([answer], tokenize=True)
