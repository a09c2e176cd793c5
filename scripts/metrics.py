"""Scores of generated text, of classes and of retrieval: by well-kept libraries where there are any."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error

References = Sequence[Sequence[str]]
NGRAMS = 4
LENGTH_SIGMA = 6.0  # words
# Chinese, and Japanese's other letters, which are written without spaces between words
CHINESE, KANA = "\u3400-\u9fff\uf900-\ufaff", "\u3040-\u30ff"
# Of latin letters those without accents, as in rouge-score
WORDS = regex.compile(
    rf"(?V1)[{KANA}{CHINESE}]|[a-z0-9]+|[\p{{L}}\p{{Nd}}--\p{{Latin}}--\p{{Common}}--[{KANA}{CHINESE}]]"
    rf"[\p{{L}}\p{{M}}\p{{Nd}}--\p{{Latin}}--[a-z0-9{KANA}{CHINESE}]]*"
)
# Of any script, with the marks that stand over and under its letters
LETTERS = rf"[[\w\p{{M}}]--[{KANA}{CHINESE}]]+"
CAPTION_WORDS = regex.compile(rf"(?V1)[{KANA}{CHINESE}]|{LETTERS}(?:'{LETTERS})?")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}


def check_finite(scores: torch.Tensor) -> None:
    """Raises `ValueError` if a score is no number: it would compare as the best or the worst."""
    if not scores.isfinite().all():
        raise ValueError("Some scores are not finite: the model has diverged")


def check_references(predictions: Sequence[str], references: References) -> None:
    """Raises `ValueError` if there is nothing to score, or nothing to score a prediction against; names the row."""
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions, but references for {len(references)}")
    if not predictions:
        raise ValueError("There are no predictions to score")
    for row, texts in enumerate(references):
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"Row {row}: expected references with some text in each, not {list(texts)!r}")


def bleu_and_chrf(predictions: Sequence[str], references: References, lowercase: bool = False) -> dict[str, Any]:
    """
    Corpus BLEU (Papineni et al. 2002) and chrF (Popović 2015), from 0 to 100, by sacrebleu, with the signatures that
    say how they were computed: against Chinese or Japanese, whose words no spaces part, by characters. Rows may have
    different numbers of references.
    """
    check_references(predictions, references)
    letters = [letter for texts in references for text in texts for letter in text if letter.isalpha()]
    unspaced = re.findall(f"[{KANA}{CHINESE}]", "".join(letters))
    tokenize = None
    if len(unspaced) > len(letters) / 2:
        tokenize = "char" if re.search(f"[{KANA}]", "".join(unspaced)) else "zh"
    width = max(map(len, references))
    # sacrebleu takes one list for each number of reference; None stands for "no more"
    columns: Any = [[texts[i] if i < len(texts) else None for texts in references] for i in range(width)]
    scores: dict[str, Any] = {}
    for name, metric in (("bleu", BLEU(lowercase=lowercase, tokenize=tokenize)), ("chrf", CHRF(lowercase=lowercase))):
        scores[name] = metric.corpus_score(predictions, columns).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


class AnyScriptTokenizer(Tokenizer):
    """
    rouge-score's stemmed words, which have nothing but a to z and 0 to 9, and the words of scripts other than Latin;
    of Chinese and Japanese each letter is one. (Thai, Lao and Khmer are not parted.)
    """

    def __init__(self) -> None:
        self.of_latin = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        words = regex.findall(WORDS, text.lower())
        return [part for word in words for part in (self.of_latin.tokenize(word) if word.isascii() else [word])]


def rouge(predictions: Sequence[str], references: References) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin 2004), F-measures from 0 to 100 by rouge-score, stemmed; the best reference counts."""
    check_references(predictions, references)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=AnyScriptTokenizer())
    rows = [scorer.score_multi(texts, text) for text, texts in zip(predictions, references, strict=True)]
    return {name: 100 * statistics.mean(row[name].fmeasure for row in rows) for name in names}


def caption_words(text: str) -> list[str]:
    """A caption's words in lower case, without punctuation; of Chinese and Japanese, each letter."""
    return regex.findall(CAPTION_WORDS, text.lower())


def ngrams(words: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """How often each sequence of 1, 2, 3 and 4 words occurs."""
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, NGRAMS + 1)]


def check_number_of_rows(num_rows: int) -> None:
    """Raises `ValueError` if there are too few rows for [`cider_d`]."""
    if num_rows < 2:
        raise ValueError(f"CIDEr-D weighs words by how many rows use them: it needs at least two rows, got {num_rows}")


def cider_d(predictions: Sequence[str], references: References) -> dict[str, float]:
    """
    CIDEr-D (Vedantam et al. 2015, section 4.1 and 5): cosines of n-grams weighted by how rare they are among the
    references of all rows, clipped, with a Gaussian penalty on the difference in length; times 10, as published.

    Raises:
        ValueError: There are fewer than two rows: how rare words are can't be told from one, and the published code
            gives 0 to whatever is predicted.
    """
    check_references(predictions, references)
    check_number_of_rows(len(predictions))
    counted = [[ngrams(caption_words(text)) for text in texts] for texts in references]
    frequency = Counter(gram for texts in counted for gram in {g for text in texts for n in text for g in n})

    def weigh(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: count * math.log(len(counted) / max(1, frequency[gram])) for gram, count in counts.items()}

    def norm(vector: dict[tuple[str, ...], float]) -> float:
        return math.sqrt(sum(value * value for value in vector.values()))

    scores = []
    for prediction, texts in zip(predictions, counted, strict=True):
        ours = ngrams(caption_words(prediction))
        vectors = [weigh(counts) for counts in ours]
        score = 0.0
        for text in texts:
            # As in the published code, lengths are counted in pairs of words
            penalty = math.exp(-((ours[1].total() - text[1].total()) ** 2) / (2 * LENGTH_SIGMA**2))
            for vector, counts in zip(vectors, text, strict=True):
                theirs = weigh(counts)
                length = norm(vector) * norm(theirs)
                if length:
                    clipped = sum(min(v, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, v in vector.items())
                    score += penalty * clipped / length
        scores.append(10 * score / (NGRAMS * len(texts)))
    return {"cider_d": statistics.mean(scores)}


def normalize_answer(text: str) -> str:
    """
    An answer much as VQA's evaluation compares it: in lower case, with digits for numbers up to ten, without articles
    and punctuation but in decimals. That spells contractions in one way, by a list; here they have no apostrophes.
    """
    text = text.lower().strip()
    plain = text
    for mark in PUNCTUATION:
        is_left_out = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        plain = plain.replace(mark, "" if is_left_out else " ")
    words = [DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)|['’]", "", plain).split()]
    # "A" may be all there is: a letter of several to choose from
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words) or text


def vqa_accuracy(predictions: Sequence[str], references: References) -> dict[str, float]:
    """
    VQA's soft accuracy (Antol et al. 2015, section 4): an answer that three people gave is right, one that fewer gave
    is right in part, averaged over leaving one of them out. With fewer than four references any of them is right.
    """
    check_references(predictions, references)
    scores = []
    for prediction, texts in zip(predictions, references, strict=True):
        answer, answers = normalize_answer(prediction), [normalize_answer(text) for text in texts]
        if len(answers) < 4:
            scores.append(float(answer in answers))
            continue
        others = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
        scores.append(statistics.mean(min(1.0, each.count(answer) / 3) for each in others))
    return {"vqa_accuracy": statistics.mean(scores)}


def classification(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """
    By scikit-learn: accuracy and macro F1 of classes; of soft scores, the mean score of the highest class (VQA as
    classification); of numbers, mean squared error and Pearson's correlation.

    Args:
        logits (`torch.FloatTensor` of shape `(num_rows, num_labels)`): The classifier's.
        labels (`torch.Tensor` of shape `(num_rows,)` or `(num_rows, num_labels)`): As the classifier learns them.
    """
    if not len(labels):
        raise ValueError("There are no predictions to score")
    check_finite(logits)
    if logits.shape[1] == 1:
        values, wanted = logits[:, 0].double().numpy(), labels.double().numpy()
        varies = len(labels) > 1 and np.ptp(values) > 0 and np.ptp(wanted) > 0
        correlation = float(np.corrcoef(values, wanted)[0, 1]) if varies else math.nan
        return {"mse": float(mean_squared_error(wanted, values)), "pearson": correlation}
    chosen = logits.argmax(dim=1)
    if labels.ndim == 2:
        return {"soft_accuracy": labels.gather(1, chosen[:, None]).double().mean().item()}
    return {
        "accuracy": float(accuracy_score(labels, chosen)),
        "f1_macro": float(f1_score(labels, chosen, average="macro")),
    }


def ranks_of_own(scores: torch.Tensor, image_of_text: torch.Tensor) -> torch.Tensor:
    """The rank of each text's own picture, from 1, of shape `(num_texts,)`. Ties count against."""
    own = scores.gather(1, image_of_text[:, None])  # (num_texts, 1)
    return (scores >= own).sum(dim=1)


def retrieval(scores: torch.Tensor, image_of_text: torch.Tensor) -> dict[str, float]:
    """
    Recall at 1, 5 and 10 (shares) and the median rank (1 is best), text to image and image to text, where a picture
    may have several texts: the first of them counts. Ties count against.

    Args:
        scores (`torch.FloatTensor` of shape `(num_texts, num_images)`): How well they fit.
        image_of_text (`torch.LongTensor` of shape `(num_texts,)`): The picture that each text belongs to.

    Raises:
        ValueError: A picture has no text, or a text no picture.
    """
    num_texts, num_images = scores.shape
    if image_of_text.shape != (num_texts,) or sorted(set(image_of_text.tolist())) != list(range(num_images)):
        raise ValueError(
            f"Each of {num_texts} texts needs one of the {num_images} pictures, and each picture a text: see "
            "`image_of_text`"
        )
    check_finite(scores)
    text_ranks = ranks_of_own(scores, image_of_text)
    belongs = image_of_text[:, None] == torch.arange(num_images)  # (num_texts, num_images)
    best = scores.masked_fill(~belongs, -torch.inf).amax(dim=0)  # (num_images,)
    image_ranks = ((scores >= best) & ~belongs).sum(dim=0) + 1
    metrics = {}
    for name, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
        for k in (1, 5, 10):
            metrics[f"{name}_recall@{k}"] = (ranks <= k).double().mean().item()
        metrics[f"{name}_median_rank"] = float(statistics.median(ranks.tolist()))
    return metrics
