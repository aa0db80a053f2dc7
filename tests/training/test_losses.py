"""Every loss against NumPy, written here row by row from its formula; and shapes that do not match raise."""

import numpy as np
import pytest
import torch

from lora_gan.training import losses

B, R, V, H, M = 5, 20, 7, 3, 2
RNG = np.random.default_rng(0)
LOGITS, REFERENCE = RNG.normal(size=(R, V)) * 3, RNG.normal(size=(R, V)) * 3
IDS = RNG.integers(0, V, size=R)
ADVANTAGE = RNG.normal(size=R)
PREDICTED, TRUE = RNG.normal(size=(M, B)), RNG.normal(size=B)
GROUP = np.array([4, 9, 4, 9, 4])  # any labels, in any order


def tensor(array):
    return torch.as_tensor(array)


def softmax(row):
    e = np.exp(row - row.max())
    return e / e.sum()


def close(ours, theirs):
    assert ours.shape == np.shape(theirs)
    assert ours.detach().numpy() == pytest.approx(np.asarray(theirs), rel=1e-10, abs=1e-12)


def logprobs():
    return np.array([np.log(softmax(LOGITS[r])[IDS[r]]) for r in range(R)])


def test_token_logprobs():
    close(losses.token_logprobs(tensor(LOGITS), tensor(IDS)), logprobs())


def test_policy_gradient():
    expected = [-ADVANTAGE[r] * logprobs()[r] for r in range(R)]
    close(losses.policy_gradient(tensor(logprobs()), tensor(ADVANTAGE)), expected)


def test_policy_gradient_does_not_lead_into_the_advantage():
    advantage = tensor(ADVANTAGE).requires_grad_(True)
    given = tensor(logprobs()).requires_grad_(True)
    losses.policy_gradient(given, advantage).sum().backward()
    assert advantage.grad is None
    assert given.grad.numpy() == pytest.approx(-ADVANTAGE)


def with_kl(logits, reference=REFERENCE, ids=IDS):
    return losses.logprobs_and_kl(tensor(logits), tensor(ids), tensor(reference))


def test_logprobs_and_kl():
    expected = []
    for r in range(R):
        p, q = softmax(LOGITS[r]), softmax(REFERENCE[r])
        expected.append(np.sum(p * np.log(p / q)))
    ours_R, kl_R = with_kl(LOGITS)
    close(ours_R, logprobs())
    close(kl_R, expected)
    assert (kl_R > 0).all()
    assert with_kl(LOGITS, LOGITS)[1].abs().max() < 1e-12


def test_the_kl_has_the_gradient_of_its_formula_and_none_for_the_reference():
    """∂KL/∂logit_v = p_v · (log p_v/q_v − KL): of KL(policy ‖ reference), not of the other one, as k3 would have."""
    logits, reference = tensor(LOGITS).requires_grad_(True), tensor(REFERENCE).requires_grad_(True)
    with_kl(logits, reference)[1].sum().backward()
    expected = np.zeros_like(LOGITS)
    for r in range(R):
        p, q = softmax(LOGITS[r]), softmax(REFERENCE[r])
        expected[r] = p * (np.log(p / q) - np.sum(p * np.log(p / q)))
    assert reference.grad is None
    assert logits.grad.numpy() == pytest.approx(expected)


def test_a_forbidden_token_counts_for_nothing():
    forbidden = np.zeros_like(LOGITS, dtype=bool)
    forbidden[..., -1] = True
    ids = np.minimum(IDS, V - 2)
    logits = tensor(np.where(forbidden, -np.inf, LOGITS)).requires_grad_(True)
    for reference in (np.where(forbidden, -np.inf, REFERENCE), REFERENCE):
        logits.grad = None
        ours_R, kl_R = with_kl(logits, reference, ids)
        few_R, expected_R = with_kl(LOGITS[..., :-1], REFERENCE[..., :-1], ids)
        lost = np.exp(REFERENCE[..., :-1]).sum(-1) / np.exp(reference).sum(-1)
        close(ours_R, few_R.numpy())
        close(kl_R, expected_R.numpy() - np.log(lost))
        (ours_R.sum() + kl_R.sum()).backward()
        assert logits.grad.isfinite().all() and not logits.grad[..., -1].any()


def test_logprobs_and_kl_have_the_gradient_that_finite_differences_give():
    logits = tensor(LOGITS).requires_grad_(True)
    assert torch.autograd.gradcheck(with_kl, (logits,))
    assert torch.autograd.gradcheck(lambda its: with_kl(its)[0], (logits,)), "where the KL has no weight"


def test_straight_through():
    gradient, table = RNG.normal(size=(R, H)), RNG.normal(size=(V, H))
    expected = [-sum(softmax(LOGITS[r])[v] * gradient[r] @ table[v] for v in range(V)) for r in range(R)]
    given = [tensor(x).requires_grad_(True) for x in (LOGITS, gradient, table)]
    ours = losses.straight_through(*given)
    close(ours, expected)
    ours.sum().backward()
    assert given[0].grad.any() and given[1].grad is None and given[2].grad is None


def test_group_mean():
    expected = [[np.mean([row[j] for j in range(B) if GROUP[j] == GROUP[i]]) for i in range(B)] for row in PREDICTED]
    close(losses.group_mean(tensor(PREDICTED), tensor(GROUP)), expected)
    close(losses.group_mean(tensor(TRUE), tensor(np.arange(B))), TRUE)


@pytest.mark.parametrize("mean_weight", [0.0, 0.25, 1.0, 3.0])
def test_regression_by_group(mean_weight):
    expected = np.zeros((M, B))
    for m in range(M):
        error = PREDICTED[m] - TRUE
        for i in range(B):
            mean = np.mean([error[j] for j in range(B) if GROUP[j] == GROUP[i]])
            expected[m, i] = (error[i] - mean) ** 2 + mean_weight * mean**2
    ours = losses.regression_by_group(tensor(PREDICTED), tensor(TRUE), tensor(GROUP), mean_weight=mean_weight)
    close(ours, expected)


def test_regression_with_mean_weight_one_is_plain_squared_error_summed_over_each_group():
    ours = losses.regression_by_group(tensor(PREDICTED), tensor(TRUE), tensor(GROUP), mean_weight=1.0).numpy()
    plain = (PREDICTED - TRUE) ** 2
    for label in set(GROUP):
        assert ours[:, GROUP == label].sum(-1) == pytest.approx(plain[:, GROUP == label].sum(-1))


def test_regression_with_mean_weight_zero_forgives_an_offset_of_a_whole_group():
    shifted = TRUE + np.where(GROUP == 4, 5.0, -3.0)
    ours = losses.regression_by_group(tensor(shifted[None]), tensor(TRUE), tensor(GROUP), mean_weight=0.0)
    assert ours.abs().max() < 1e-20


def test_ranking_by_group():
    expected = np.zeros((M, B))
    for m in range(M):
        for i in range(B):
            lower = [j for j in range(B) if GROUP[j] == GROUP[i] and TRUE[j] < TRUE[i]]
            terms = [(TRUE[i] - TRUE[j]) * np.log1p(np.exp(-(PREDICTED[m, i] - PREDICTED[m, j]))) for j in lower]
            expected[m, i] = sum(terms) / max(1, len(lower))
    close(losses.ranking_by_group(tensor(PREDICTED), tensor(TRUE), tensor(GROUP)), expected)


def test_ranking_asks_nothing_of_ties_and_of_other_groups():
    same = torch.zeros(B, dtype=torch.float64)
    predicted = tensor(PREDICTED).requires_grad_(True)
    assert not losses.ranking_by_group(predicted, same, tensor(GROUP)).any()
    assert not losses.ranking_by_group(predicted, tensor(TRUE), torch.arange(B)).any()
    two = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    losses.ranking_by_group(predicted, two, torch.tensor([0, 0, 0, 1, 2])).sum().backward()
    assert predicted.grad[:, :3].all() and not predicted.grad[:, 3:].any(), "alone in its group"
    assert (predicted.grad[:, :2] < 0).all() and (predicted.grad[:, 2] > 0).all(), "the better up, the worse down"


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.token_logprobs(tensor(LOGITS), tensor(IDS[:1])),
        lambda: losses.token_logprobs(tensor(LOGITS), tensor(IDS[:, None])),
        lambda: losses.policy_gradient(tensor(logprobs()), tensor(ADVANTAGE[:1])),
        lambda: losses.policy_gradient(tensor(logprobs()), tensor(ADVANTAGE[:, None])),
        lambda: losses.policy_gradient(tensor(logprobs()), torch.tensor(1.0)),
        lambda: losses.clipped_policy_gradient(*map(tensor, (logprobs(), logprobs()[:1], ADVANTAGE)), epsilon=0.2),
        lambda: losses.clipped_policy_gradient(*map(tensor, (logprobs(), logprobs(), ADVANTAGE[:1])), epsilon=0.2),
        lambda: with_kl(LOGITS, REFERENCE[:1]),
        lambda: with_kl(LOGITS, ids=IDS[:1]),
        lambda: losses.straight_through(tensor(LOGITS), torch.zeros(1, H), torch.zeros(V, H)),
        lambda: losses.straight_through(tensor(LOGITS), torch.zeros(R, H), torch.zeros(1, H)),
        lambda: losses.regression_by_group(tensor(PREDICTED), tensor(TRUE[:1]), tensor(GROUP), mean_weight=1.0),
        lambda: losses.regression_by_group(tensor(PREDICTED), tensor(TRUE), tensor(GROUP[:1]), mean_weight=1.0),
        lambda: losses.regression_by_group(tensor(PREDICTED), tensor(TRUE[:, None]), tensor(GROUP), mean_weight=1.0),
        lambda: losses.ranking_by_group(tensor(PREDICTED), tensor(TRUE[:1]), tensor(GROUP)),
        lambda: losses.ranking_by_group(tensor(PREDICTED), tensor(TRUE), tensor(GROUP[:1])),
        lambda: losses.group_mean(tensor(PREDICTED), tensor(GROUP[:1])),
    ],
)
def test_shapes_that_do_not_match_raise(call):
    """Above all those that PyTorch would broadcast."""
    with pytest.raises(ValueError, match="shape"):
        call()
