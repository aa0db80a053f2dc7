"""Rewards for the form of a response, to be summed with other rewards: its length, and how much it repeats itself.

Words are separated by whitespace.
"""

from .text import distinct_n


class Length:
    """How close the length of a response, in words, is to the wanted length, in [0, 1].

    The score is 1 within `tolerance` of the wanted length. Beyond that it decreases linearly, to 0 at zero words and at
    twice the wanted length: max(0, 1 − (|n − wanted| − t) / (wanted − t)), with t = tolerance · wanted.

    Args:
        target_words: the wanted number of words; None: the number of words in the target. If the target has no words,
            the score is 1 for a response without words, else 0.
        tolerance: deviation without a lower score, as a share of the wanted length, in [0, 1).

    Raises:
        ValueError: target_words is less than 1, or tolerance is outside [0, 1).
    """

    __name__ = "length"  # the name in logs

    def __init__(self, target_words: int | None = None, tolerance: float = 0.1) -> None:
        if target_words is not None and target_words < 1:
            raise ValueError(f"target_words is {target_words}; it must be 1 or more, or None for the target's length")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}; it must be a share of at least 0 and below 1")
        self.target_words = target_words
        self.needs_target = target_words is None
        self.tolerance = tolerance

    def __call__(self, response: str, target: str | None = None) -> float:
        """Score one response.

        Raises:
            ValueError: `target_words` is None, and there is no target.
        """
        wanted = self.target_words
        if wanted is None:
            if target is None:
                raise ValueError("there is no target to take the length from: give target_text or target_words")
            wanted = len(target.split())
        words = len(response.split())
        if wanted == 0:
            return float(words == 0)
        free = self.tolerance * wanted
        return min(1.0, max(0.0, 1 - (abs(words - wanted) - free) / (wanted - free)))


def repetition(response: str, target: str | None = None, n: int = 3) -> float:
    """Minus the share of word n-grams that have stood in the response before, in (−1, 0]; higher is better.

    Case is kept. 0.0 where there are fewer than n words; `target` is not read.
    """
    return distinct_n([response], n) - 1.0 if len(response.split()) >= n else 0.0
