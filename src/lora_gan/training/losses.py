"""The losses, as pure functions: tensors in, one number per row out; the caller reduces. Both trainers use them.

# B = responses, T = response tokens, V = vocabulary, H = hidden size, M = heads of the discriminator
A mask is 1 on real tokens (the end-of-text token included) and 0 on padding. Shapes that do not match raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Log-probability of each given token, [B, T]."""
    _check("ids_BT", ids_BT, tuple(logits_BTV.shape[:2]))
    return logits_BTV.log_softmax(-1).gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)


def policy_gradient(logprobs_BT: Tensor, mask_BT: Tensor, advantage_B: Tensor) -> Tensor:
    """REINFORCE on whole responses, [B]: −advantage · Σ_t log π(token_t).

    Summed over tokens, not averaged: the response is the action (Ahmadian et al. 2024, arXiv:2402.14740, section 3).
    """
    _check("mask_BT", mask_BT, tuple(logprobs_BT.shape))
    _check("advantage_B", advantage_B, (logprobs_BT.shape[0],))
    return -advantage_B.detach() * (logprobs_BT * mask_BT).sum(-1)


def clipped_policy_gradient(
    logprobs_BT: Tensor, sampled_BT: Tensor, mask_BT: Tensor, advantage_B: Tensor, *, epsilon: float
) -> Tensor:
    """PPO's clipped surrogate, [B]: −Σ_t min(ρ_t A, clip(ρ_t, 1 ± ε) A), ρ_t the token's probability ratio to the
    policy that sampled it (Schulman et al. 2017, arXiv:1707.06347). At ρ = 1 its gradient is `policy_gradient`'s."""
    _check("sampled_BT", sampled_BT, tuple(logprobs_BT.shape))
    _check("mask_BT", mask_BT, tuple(logprobs_BT.shape))
    _check("advantage_B", advantage_B, (logprobs_BT.shape[0],))
    ratio_BT = (logprobs_BT - sampled_BT.detach()).exp()
    advantage_B1 = advantage_B.detach()[:, None]
    worse_BT = torch.minimum(ratio_BT * advantage_B1, ratio_BT.clamp(1 - epsilon, 1 + epsilon) * advantage_B1)
    return -(worse_BT * mask_BT).sum(-1)


def entropy(logits_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """Entropy in nats a response, [B]: exact over the vocabulary at each sampled place, summed."""
    _check("mask_BT", mask_BT, tuple(logits_BTV.shape[:2]))
    logprobs = logits_BTV.log_softmax(-1)
    return -((logprobs.exp() * logprobs).sum(-1) * mask_BT).sum(-1)


def logprobs_and_kl(
    logits_BTV: Tensor, ids_BT: Tensor, reference_BTV: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` [B, T], and KL(π ‖ reference) in nats a response, [B]: exact over the vocabulary at each sampled
    position, summed.

    Not the k3 sample estimate: used as a loss, its gradient is that of the other KL, from reference to policy.
    """
    _check("ids_BT", ids_BT, tuple(logits_BTV.shape[:2]))
    _check("reference_BTV", reference_BTV, tuple(logits_BTV.shape))
    _check("mask_BT", mask_BT, tuple(logits_BTV.shape[:2]))
    logprobs_BT, kl_BT = _LogprobsAndKL.apply(logits_BTV, ids_BT, reference_BTV.detach())
    return logprobs_BT, (kl_BT * mask_BT).sum(-1)


class _LogprobsAndKL(torch.autograd.Function):
    """Both at each place. Passes over the vocabulary take much of an update; autograd would make twice as many."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, ids_BT: Tensor, reference_BTV: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_BTV = logits_BTV.log_softmax(-1)
        token_BT = logprobs_BTV.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
        surplus_BTV = logprobs_BTV - reference_BTV.log_softmax(-1)
        probs_BTV = logprobs_BTV.exp_()
        kl_BT = (probs_BTV * surplus_BTV).sum(-1)
        if kl_BT.isnan().any():  # 0 · log 0 is 0: a base may forbid tokens
            surplus_BTV.masked_fill_((probs_BTV == 0) & ~surplus_BTV.isfinite(), 0.0)
            kl_BT = (probs_BTV * surplus_BTV).sum(-1)
        ctx.save_for_backward(probs_BTV, surplus_BTV, kl_BT, ids_BT)
        return token_BT, kl_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """∂ log π(token) = 1[token] − π and ∂ KL = π · (log π − log reference − KL), with respect to logits."""
        token_BT1, kl_BT1 = (gradient.unsqueeze(-1) for gradient in gradients)
        probs_BTV, surplus_BTV, mean_BT, ids_BT = ctx.saved_tensors
        gradient_BTV = (surplus_BTV - mean_BT.unsqueeze(-1)).mul_(kl_BT1).sub_(token_BT1).mul_(probs_BTV)
        return gradient_BTV.scatter_add_(-1, ids_BT.unsqueeze(-1), token_BT1), None, None


def imitation(logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Cross-entropy on the target text (supervised fine-tuning), mean nats a token, [B]."""
    _check("mask_BT", mask_BT, tuple(logprobs_BT.shape))
    return -(logprobs_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)


def straight_through(logits_BTV: Tensor, gradient_BTH: Tensor, embeddings_VH: Tensor, mask_BT: Tensor) -> Tensor:
    """The discriminator's gradient with respect to the sampled tokens' embeddings, led into the generator, [B].

    −Σ_t Σ_v p_t(v) · (g_t · E_v): the discriminator is taken as linear in the embedding of each sampled token, and the
    token's one-hot vector is replaced by the probabilities it was sampled from (straight-through estimator, Bengio et
    al. 2013, arXiv:1308.3432). Exact for one token and a linear discriminator; biased elsewhere, which is reported.
    """
    _check("mask_BT", mask_BT, tuple(logits_BTV.shape[:2]))
    _check("gradient_BTH", gradient_BTH, (*mask_BT.shape, embeddings_VH.shape[-1]))
    _check("embeddings_VH", embeddings_VH, (logits_BTV.shape[-1], gradient_BTH.shape[-1]))
    value_BTV = gradient_BTH.detach() @ embeddings_VH.detach().T
    expected_BT = (logits_BTV.softmax(-1) * value_BTV).sum(-1)
    return -(expected_BT * mask_BT).sum(-1)


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
