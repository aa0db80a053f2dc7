"""Rewards that read a response's form alone, as parts of a sum: how long it is, how often it repeats itself.

Words are what stands between spaces.
"""

from .text import distinct_n


class Length:
    """How near a response's length in words is to the one wanted, in [0, 1].

    1 within `tolerance` of the wanted length; from there it falls in a straight line, to 0 at no words and at twice
    the wanted length: max(0, 1 − (|n − wanted| − t) / (wanted − t)), with t = tolerance · wanted.

    Args:
        target_words: the length wanted; None = as many words as the target has (no words wanted: 1 for none, else 0).
        tolerance: share of the wanted length by which it may be missed for nothing, in [0, 1).
    """

    __name__ = "length"  # what logs call this part of a sum of rewards

    def __init__(self, target_words: int | None = None, tolerance: float = 0.1) -> None:
        if target_words is not None and target_words < 1:
            raise ValueError(f"target_words is {target_words}; it must be 1 or more, or None for the target's length")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}; it is a share, 0 or more and below 1")
        self.target_words = target_words
        self.needs_target = target_words is None
        self.tolerance = tolerance

    def __call__(self, response: str, target: str | None = None) -> float:
        """Score one response.

        Raises:
            ValueError: the length wanted is the target's, and there is no target.
        """
        wanted = self.target_words
        if wanted is None:
            if target is None:
                raise ValueError("there is no target to take the length from: give target_text, or target_words")
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
