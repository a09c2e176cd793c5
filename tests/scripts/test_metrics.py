"""Every score is what its definition says, worked out by hand or by another program."""

import math

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from duostream.scripts import metrics

CAPTIONS = [
    ["a dog runs on the grass", "a brown dog is running through the grass"],
    ["two men play football", "two men are playing football on a field", "men play"],
    ["a girl in a red dress jumps", "the girl jumps"],
    ["a dog jumps over a red bar"],
]
PREDICTIONS = [
    "a dog runs through the grass",
    "two men play football on the grass",
    "a red dog",
    "a dog jumps over a red bar",
]
GENERATED = [metrics.bleu_and_chrf, metrics.rouge, metrics.cider_d, metrics.vqa_accuracy]


def test_cider_d_is_that_of_pycocoevalcap():
    # pycocoevalcap 1.2, CiderScorer(n=4, sigma=6.0): rows 3.33025272, 3.2847026, 0.28683639, 10
    assert metrics.cider_d(PREDICTIONS, CAPTIONS)["cider_d"] == pytest.approx(4.225447928106698, rel=1e-9)


def test_cider_d_hears_neither_case_nor_punctuation():
    loud = [f"{text.upper()} ." for text in PREDICTIONS]
    assert metrics.cider_d(loud, CAPTIONS) == metrics.cider_d(PREDICTIONS, CAPTIONS)


def test_bleu_is_its_formula_and_says_how_it_was_computed():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples of "the cat sat on it"; one word short of 6
    scores = metrics.bleu_and_chrf(["the cat sat on it"], [["the cat sat on the mat"]])
    expected = 100 * math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert scores["bleu"] == pytest.approx(expected)
    assert "version" in scores["bleu_signature"] and "nc:6" in scores["chrf_signature"]


def test_rows_may_have_different_numbers_of_references():
    assert metrics.bleu_and_chrf(["a b c d e", "f g h i j"], [["a b c d e", "x"], ["f g h i j"]])[
        "bleu"
    ] == pytest.approx(100)


def test_rouge_takes_the_best_reference():
    # 2 of 3 words against 2 of 4; against the other reference all
    scores = metrics.rouge(["red cats sleep"], [["red cats sit still"]])
    assert scores["rouge1"] == pytest.approx(100 * 4 / 7)
    assert metrics.rouge(["red cats sleep"], [["red cats sit still", "red cats sleep"]])["rougeL"] == 100


def test_vqa_accuracy_asks_for_three_people_of_ten():
    answers = ["yes"] * 2 + ["no"] * 8
    # Two people said so: left out in 2 of 10 cases, when only one is left
    assert metrics.vqa_accuracy(["Yes."], [answers])["vqa_accuracy"] == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert metrics.vqa_accuracy(["no"], [answers])["vqa_accuracy"] == 1
    assert metrics.vqa_accuracy(["the chair", "a lamp"], [["chair"], ["table", "desk"]])["vqa_accuracy"] == 0.5


def test_classes_are_counted_and_averaged():
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [2, 0, 0]])
    scores = metrics.classification(logits, torch.tensor([0, 1, 0, 2]))
    assert scores["accuracy"] == 0.5
    assert scores["f1_macro"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def test_soft_scores_and_numbers():
    soft = torch.tensor([[0.3, 0.9], [1.0, 0.0]])
    assert metrics.classification(torch.tensor([[0.0, 1], [0, 1]]), soft)["soft_accuracy"] == pytest.approx(0.45)
    scores = metrics.classification(torch.tensor([[1.0], [2], [4]]), torch.tensor([2.0, 4, 8]))
    assert scores["mse"] == pytest.approx((1 + 4 + 16) / 3)
    assert scores["pearson"] == pytest.approx(1)


def test_recall_and_rank_are_counted_both_ways():
    # Pictures 0 and 1 have two texts each
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.65]])
    found = metrics.retrieval(scores, torch.tensor([0, 0, 1, 1]))
    assert found["text_to_image_recall@1"] == 0.75
    assert found["image_to_text_recall@1"] == 0.5  # of picture 1, text 1 scores higher than both of its own
    assert found["image_to_text_recall@5"] == 1
    assert (found["text_to_image_median_rank"], found["image_to_text_median_rank"]) == (1, 1.5)


def test_a_retriever_that_scores_all_alike_finds_nothing():
    found = metrics.retrieval(torch.zeros(20, 20), torch.arange(20))
    assert found["text_to_image_recall@10"] == found["image_to_text_recall@10"] == 0
    assert found["text_to_image_median_rank"] == 20


def test_a_picture_without_a_text_is_an_error():
    with pytest.raises(ValueError, match="each picture a text"):
        metrics.retrieval(torch.zeros(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("score", GENERATED)
def test_an_empty_reference_is_an_error_that_names_the_row(score):
    for empty in ([""], [], [" "]):
        with pytest.raises(ValueError, match="Row 1"):
            score(["a", "b"], [["a"], empty])


@pytest.mark.parametrize("score", GENERATED)
def test_nothing_to_score_is_an_error(score):
    with pytest.raises(ValueError, match="no predictions"):
        score([], [])


def test_scores_that_are_no_numbers_are_no_success():
    for score, wanted in ((metrics.retrieval, torch.arange(3)), (metrics.classification, torch.zeros(3).long())):
        with pytest.raises(ValueError, match="not finite"):
            score(torch.full((3, 3), torch.nan), wanted)


def test_an_answer_that_is_an_article_is_an_answer():
    assert metrics.vqa_accuracy(["B", "", "a"], [["A"], ["A"], ["A"]])["vqa_accuracy"] == pytest.approx(1 / 3)


def test_cider_d_parts_chinese_and_leaves_words_of_other_scripts_whole():
    chinese = [["一只猫在沙发上睡觉"], ["一个男人在骑自行车"], ["两只狗在海滩上奔跑"]]
    assert metrics.cider_d([texts[0] for texts in chinese], chinese)["cider_d"] == pytest.approx(10)
    shorter = metrics.cider_d(["一只猫在沙发上睡", "一个男人骑自行车", "两只狗在海滩奔跑"], chinese)["cider_d"]
    assert 5 < shorter < 10
    assert metrics.caption_words("हिन्दी में: एक बिल्ली!") == ["हिन्दी", "में", "एक", "बिल्ली"]
    assert metrics.caption_words("The dog's café, don''t") == ["the", "dog's", "café", "don", "t"]


def test_cider_d_of_one_row_is_an_error():
    # pycocoevalcap 1.2 gives 0 to each of these, as each word is in all of the rows
    assert metrics.cider_d(["a dog"] * 2, [["a dog"]] * 2)["cider_d"] == 0
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        metrics.cider_d(["a dog"], [["a dog"]])


@pytest.mark.parametrize("score", [metrics.bleu_and_chrf, metrics.rouge, metrics.vqa_accuracy])
def test_an_empty_prediction_scores_nothing(score):
    numbers = [value for value in score([""], [["a dog"]]).values() if not isinstance(value, str)]
    assert numbers and not any(numbers)


@pytest.mark.parametrize(
    ("prediction", "reference", "is_right"),
    [
        ("2", "two", True),
        ("none", "0", True),
        ("dont", "don't", True),
        ("1,000", "1000", True),
        ("e.g.", "eg", True),
        ("Red, blue!", "red blue", True),
        ("well-known - yes", "wellknown yes", True),
        ("red/blue", "red blue", True),
        ("3.5", "3 5", False),
        ("C++", "C#", False),
        ("$5", "5", False),
        ("", "!", False),
        ("!", "?", False),
        ("×", "÷", False),
    ],
)
def test_answers_are_compared_as_by_vqa_s_evaluation(prediction, reference, is_right):
    assert metrics.vqa_accuracy([prediction], [[reference]])["vqa_accuracy"] == is_right


@pytest.mark.parametrize(
    "text", ["привет большой мир", "日本語の文章です", "你好世界", "мой iPhone упал", "हिन्दी में लिखा"]
)
def test_texts_of_any_script_are_compared_by_their_words(text):
    assert metrics.rouge([text], [[text]]) == {"rouge1": 100, "rouge2": 100, "rougeL": 100}
    assert 0 < metrics.rouge([text[: len(text) // 2]], [[text]])["rouge1"] < 100
    assert metrics.rouge(["completely other"], [[text]])["rouge1"] == 0


def test_rouge_of_latin_letters_is_that_of_rouge_score():
    texts = ["Les élèves étaient arrivés", "Running dogs, 2 of them", "A 5 µm layer", "le\u0301ger, straße"]
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    for text, other in zip(texts, ["les eleves", "a running dog", "a 5 um layer", "ger stra e"], strict=True):
        assert metrics.rouge([other], [[text]])["rouge1"] == 100 * scorer.score(text, other)["rouge1"].fmeasure


def test_a_foreign_word_changes_little_for_the_words_around_it():
    text = "the running dogs played happily in beijing"
    assert metrics.rouge([text], [[f"{text} (北京)"]])["rouge1"] == pytest.approx(100 * 14 / 16)
    assert metrics.rouge(["कि"], [["का"]])["rouge1"] == 0
    assert "tok:13a" in metrics.bleu_and_chrf([text], [[f"{text} ツ"]])["bleu_signature"]


def test_bleu_against_chinese_counts_characters_and_says_so():
    scores = metrics.bleu_and_chrf(["一只狗在草地上跑"], [["一只狗在草地上奔跑"]])
    assert 50 < scores["bleu"] < 100 and "tok:zh" in scores["bleu_signature"]
