"""The losses, as pure functions: tensors in, one number per row out; the caller reduces. Both trainers use them.

# R = response tokens, V = vocabulary, H = hidden size, B = responses, M = heads of the discriminator
Every loss of the generator is a sum over tokens, so its functions work on the tokens of several responses at once.
Shapes that do not match raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def token_logprobs(logits_RV: Tensor, ids_R: Tensor) -> Tensor:
    """Log-probability of each given token, [R]."""
    _check("ids_R", ids_R, tuple(logits_RV.shape[:1]))
    return logits_RV.log_softmax(-1).gather(-1, ids_R.unsqueeze(-1)).squeeze(-1)


def policy_gradient(logprobs_R: Tensor, advantage_R: Tensor) -> Tensor:
    """REINFORCE on whole responses, [R]: −advantage · log π(token), the advantage that of the token's response.

    Summed over a response's tokens, not averaged: the response is the action (Ahmadian et al. 2024, arXiv:2402.14740,
    section 3).
    """
    _check("advantage_R", advantage_R, tuple(logprobs_R.shape))
    return -advantage_R.detach() * logprobs_R


def clipped_policy_gradient(
    logprobs_R: Tensor, old_logprobs_R: Tensor, advantage_R: Tensor, *, epsilon: float
) -> Tensor:
    """PPO's clipped surrogate, [R]: −min(ρ A, clip(ρ, 1 ± ε) A), ρ the token's probability ratio to the policy that
    sampled it (Schulman et al. 2017, arXiv:1707.06347). At ρ = 1 its gradient is `policy_gradient`'s."""
    _check("old_logprobs_R", old_logprobs_R, tuple(logprobs_R.shape))
    _check("advantage_R", advantage_R, tuple(logprobs_R.shape))
    ratio_R, advantage_R = (logprobs_R - old_logprobs_R.detach()).exp(), advantage_R.detach()
    return -torch.minimum(ratio_R * advantage_R, ratio_R.clamp(1 - epsilon, 1 + epsilon) * advantage_R)


def entropy(logits_RV: Tensor) -> Tensor:
    """Entropy in nats, [R]: exact over the vocabulary at each sampled position."""
    logprobs_RV = logits_RV.log_softmax(-1)
    return -(logprobs_RV.exp() * logprobs_RV).sum(-1)


def logprobs_and_kl(logits_RV: Tensor, ids_R: Tensor, reference_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and KL(π ‖ reference) in nats, each [R]; the KL is exact over the vocabulary at each sampled
    position.

    Not the k3 sample estimate: used as a loss, its gradient is that of the other KL, from reference to policy.
    """
    _check("ids_R", ids_R, tuple(logits_RV.shape[:1]))
    _check("reference_RV", reference_RV, tuple(logits_RV.shape))
    logprobs_R, kl_R = _LogprobsAndKL.apply(logits_RV, ids_R, reference_RV.detach())
    return logprobs_R, kl_R


class _LogprobsAndKL(torch.autograd.Function):
    """Both at each position. Passes over the vocabulary take much of an update; autograd would make twice as many."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, ids_R: Tensor, reference_RV: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_RV = logits_RV.log_softmax(-1)
        token_R = logprobs_RV.gather(-1, ids_R.unsqueeze(-1)).squeeze(-1)
        surplus_RV = logprobs_RV - reference_RV.log_softmax(-1)
        probs_RV = logprobs_RV.exp_()
        kl_R = (probs_RV * surplus_RV).sum(-1)
        if kl_R.isnan().any():  # 0 · log 0 is 0: a base may forbid tokens
            surplus_RV.masked_fill_((probs_RV == 0) & ~surplus_RV.isfinite(), 0.0)
            kl_R = (probs_RV * surplus_RV).sum(-1)
        ctx.save_for_backward(probs_RV, surplus_RV, kl_R, ids_R)
        return token_R, kl_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """∂ log π(token) = 1[token] − π and ∂ KL = π · (log π − log reference − KL), with respect to logits."""
        token_R1, kl_R1 = (gradient.unsqueeze(-1) for gradient in gradients)
        probs_RV, surplus_RV, mean_R, ids_R = ctx.saved_tensors
        gradient_RV = (surplus_RV - mean_R.unsqueeze(-1)).mul_(kl_R1).sub_(token_R1).mul_(probs_RV)
        return gradient_RV.scatter_add_(-1, ids_R.unsqueeze(-1), token_R1), None, None


def straight_through(logits_RV: Tensor, gradient_RH: Tensor, embeddings_VH: Tensor) -> Tensor:
    """The discriminator's gradient with respect to the sampled tokens' embeddings, led into the generator, [R].

    −Σ_v p(v) · (g · E_v): the discriminator is taken as linear in the embedding of each sampled token, and the
    token's one-hot vector is replaced by the probabilities it was sampled from (straight-through estimator, Bengio et
    al. 2013, arXiv:1308.3432). Exact for one token and a linear discriminator; biased elsewhere, which is reported.
    """
    _check("gradient_RH", gradient_RH, (len(logits_RV), embeddings_VH.shape[-1]))
    _check("embeddings_VH", embeddings_VH, (logits_RV.shape[-1], gradient_RH.shape[-1]))
    value_RV = gradient_RH.detach() @ embeddings_VH.detach().T
    return -(logits_RV.softmax(-1) * value_RV).sum(-1)


def regression_by_group(predicted_MB: Tensor, true_B: Tensor, group_B: Tensor, *, mean_weight: float) -> Tensor:
    """Squared error split into what is left within a group, and the group's mean, [M, B].

    The generator consumes only differences within a group, and the spread between prompts is several times larger: an
    unsplit squared error spends the discriminator on telling easy prompts from hard ones. So
    (error − group's mean error)² + mean_weight · (group's mean error)².
    """
    _check("true_B", true_B, (predicted_MB.shape[1],))
    _check("group_B", group_B, (predicted_MB.shape[1],))
    error_MB = predicted_MB - true_B
    mean_MB = group_mean(error_MB, group_B)
    return (error_MB - mean_MB).square() + mean_weight * mean_MB.square()


def ranking_by_group(predicted_MB: Tensor, true_B: Tensor, group_B: Tensor) -> Tensor:
    """Within-group pairwise logistic loss, [M, B]: each response against those of its group with a lower true reward.

    log(1 + exp(−(predicted_i − predicted_j))), rewards in units of their spread, weighted by the true difference, so
    that ties and near-ties ask for nothing (RankNet, Burges et al. 2005; Bradley–Terry). A response that beats none of
    its group scores 0.
    """
    _check("true_B", true_B, (predicted_MB.shape[1],))
    _check("group_B", group_B, (predicted_MB.shape[1],))
    margin_BB = (true_B[:, None] - true_B[None, :]).clamp(min=0)
    weight_BB = torch.where(group_B[:, None] == group_B[None, :], margin_BB, torch.zeros_like(margin_BB))
    loss_MBB = torch.nn.functional.softplus(-(predicted_MB[:, :, None] - predicted_MB[:, None, :]))
    count_B = (weight_BB > 0).sum(-1).clamp(min=1)
    return (loss_MBB * weight_BB).sum(-1) / count_B


def group_mean(values_B: Tensor, group_B: Tensor) -> Tensor:
    """Each row's mean over its group; the last axis is B. Group labels may be any integers."""
    _check("group_B", group_B, (values_B.shape[-1],))
    _, index_B = torch.unique(group_B, return_inverse=True)
    index = index_B.expand(values_B.shape)
    size = (*values_B.shape[:-1], int(index_B.max()) + 1)
    total = values_B.new_zeros(size).scatter_add(-1, index, values_B)
    count = values_B.new_zeros(size).scatter_add(-1, index, torch.ones_like(values_B))
    return (total / count).gather(-1, index)
