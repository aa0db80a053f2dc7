"""The losses as pure functions: tensors in, one number per row out. The caller reduces. Both trainers use them.

# R = response tokens, V = vocabulary, H = hidden size, B = responses, M = heads of the discriminator

The generator's losses are sums over tokens, so these functions take the tokens of several responses together.
All functions raise ValueError if shapes do not match.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def token_logprobs(logits_RV: Tensor, ids_R: Tensor) -> Tensor:
    """Log-probability of each given token in nats, [R]."""
    _check("ids_R", ids_R, tuple(logits_RV.shape[:1]))
    return logits_RV.log_softmax(-1).gather(-1, ids_R.unsqueeze(-1)).squeeze(-1)


def policy_gradient(logprobs_R: Tensor, advantage_R: Tensor) -> Tensor:
    """REINFORCE on whole responses, [R]: −advantage · log π(token), with the advantage of the token's response.

    The caller sums over a response's tokens instead of averaging: the response is the action (Ahmadian et al. 2024,
    arXiv:2402.14740, section 3).
    """
    _check("advantage_R", advantage_R, tuple(logprobs_R.shape))
    return -advantage_R.detach() * logprobs_R


def clipped_policy_gradient(
    logprobs_R: Tensor, old_logprobs_R: Tensor, advantage_R: Tensor, *, epsilon: float
) -> Tensor:
    """PPO's clipped surrogate, [R]: −min(ρ A, clip(ρ, 1 ± ε) A) (Schulman et al. 2017, arXiv:1707.06347).

    ρ is the token's probability divided by its probability under the policy that sampled it. At ρ = 1 the gradient
    equals that of `policy_gradient`.
    """
    _check("old_logprobs_R", old_logprobs_R, tuple(logprobs_R.shape))
    _check("advantage_R", advantage_R, tuple(logprobs_R.shape))
    ratio_R, advantage_R = (logprobs_R - old_logprobs_R.detach()).exp(), advantage_R.detach()
    return -torch.minimum(ratio_R * advantage_R, ratio_R.clamp(1 - epsilon, 1 + epsilon) * advantage_R)


def logprobs_and_kl(logits_RV: Tensor, ids_R: Tensor, reference_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and KL(π ‖ reference) in nats, each [R]. The KL is exact over the vocabulary at each position.

    The k3 sample estimate is not used: as a loss, its gradient is that of the reverse KL, from reference to policy.
    """
    _check("ids_R", ids_R, tuple(logits_RV.shape[:1]))
    _check("reference_RV", reference_RV, tuple(logits_RV.shape))
    logprobs_R, kl_R = _LogprobsAndKL.apply(logits_RV, ids_R, reference_RV.detach())
    return logprobs_R, kl_R


class _LogprobsAndKL(torch.autograd.Function):
    """Log-probability and KL in one function. Autograd would pass over the vocabulary twice as often, which is slow."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, ids_R: Tensor, reference_RV: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_RV = logits_RV.log_softmax(-1)
        token_R = logprobs_RV.gather(-1, ids_R.unsqueeze(-1)).squeeze(-1)
        surplus_RV = logprobs_RV - reference_RV.log_softmax(-1)
        probs_RV = logprobs_RV.exp_()
        kl_R = (probs_RV * surplus_RV).sum(-1)
        if kl_R.isnan().any():  # a base may give a token probability 0, and 0 · log 0 counts as 0
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
    """Loss that carries the discriminator's gradient into the generator, [R]: −Σ_v p(v) · (g · E_v).

    The discriminator is treated as linear in the embedding of each sampled token. The token's one-hot vector is
    replaced by the sampling probabilities (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
    This is exact for a single token and a linear discriminator, and biased otherwise.

    Args:
        logits_RV: the generator's logits.
        gradient_RH: gradient of the predicted reward with respect to each token's embedding, g above.
        embeddings_VH: embedding of every token, E above.
    """
    _check("gradient_RH", gradient_RH, (len(logits_RV), embeddings_VH.shape[-1]))
    _check("embeddings_VH", embeddings_VH, (logits_RV.shape[-1], gradient_RH.shape[-1]))
    value_RV = gradient_RH.detach() @ embeddings_VH.detach().T
    return -(logits_RV.softmax(-1) * value_RV).sum(-1)


def regression_by_group(predicted_MB: Tensor, true_B: Tensor, group_B: Tensor, *, mean_weight: float) -> Tensor:
    """Squared error, split into differences within a group and the group's mean, [M, B].

    The loss is (error − group's mean error)² + mean_weight · (group's mean error)². The generator uses only
    differences within a group, but rewards differ several times more between prompts. With an unsplit squared error
    the discriminator would mainly learn which prompts are easy.
    """
    _check("true_B", true_B, (predicted_MB.shape[1],))
    _check("group_B", group_B, (predicted_MB.shape[1],))
    error_MB = predicted_MB - true_B
    mean_MB = group_mean(error_MB, group_B)
    return (error_MB - mean_MB).square() + mean_weight * mean_MB.square()


def ranking_by_group(predicted_MB: Tensor, true_B: Tensor, group_B: Tensor) -> Tensor:
    """Pairwise logistic loss within groups, [M, B]: each response against the lower-rewarded ones of its group.

    Per pair log(1 + exp(−(predicted_i − predicted_j))), with rewards in units of their spread (RankNet, Burges et al.
    2005; Bradley–Terry). Each pair is weighted by its true difference, so ties have no effect. The loss is 0 for a
    response with the lowest true reward of its group.
    """
    _check("true_B", true_B, (predicted_MB.shape[1],))
    _check("group_B", group_B, (predicted_MB.shape[1],))
    margin_BB = (true_B[:, None] - true_B[None, :]).clamp(min=0)
    weight_BB = torch.where(group_B[:, None] == group_B[None, :], margin_BB, torch.zeros_like(margin_BB))
    loss_MBB = torch.nn.functional.softplus(-(predicted_MB[:, :, None] - predicted_MB[:, None, :]))
    count_B = (weight_BB > 0).sum(-1).clamp(min=1)
    return (loss_MBB * weight_BB).sum(-1) / count_B


def group_mean(values_B: Tensor, group_B: Tensor) -> Tensor:
    """Mean over each row's group, in the shape of `values_B`. The last axis is B. Group labels may be any integers."""
    _check("group_B", group_B, (values_B.shape[-1],))
    _, index_B = torch.unique(group_B, return_inverse=True)
    index = index_B.expand(values_B.shape)
    size = (*values_B.shape[:-1], int(index_B.max()) + 1)
    total = values_B.new_zeros(size).scatter_add(-1, index, values_B)
    count = values_B.new_zeros(size).scatter_add(-1, index, torch.ones_like(values_B))
    return (total / count).gather(-1, index)
