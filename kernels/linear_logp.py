"""Fused head: hidden states -> log-probability of the target and entropy of the distribution, token by token.

Replaces `logits = x @ w.T; log_softmax; gather` of SFT, RL and scoring. At T=8192, V=151,936 the logits alone are
5 GB in fp32, and keeping them in bf16 instead costs up to 0.03 nat a token. Here only a chunk of logits exists at
any time, in fp32 accumulators, and the losses stay plain PyTorch on the [T] vectors that come out.

Cost: a product of 2*T*H*V FLOPs forward, the same once more in backward (recompute), one for dx and one for dw.
"""

import torch

from kernels.dispatch import accumulator, check


def linear_logp(x_TH, w_VH, y_T, temperature=1.0, ignore_index=-100):
    """log softmax(x @ w.T / temperature)[y] and the entropy of that softmax.

    x_TH [T,H] hidden states, w_VH [V,H] head, y_T [T] int64 targets -> (logp_T, entropy_T), nats, fp32 (fp64 for
    fp64 inputs). Both outputs are differentiable for any upstream gradient. Rows whose target is `ignore_index` give
    0 and 0 and get zero gradients. A frozen `w_VH` costs no dW. Raises ValueError for shapes that do not agree.
    """
    check(x_TH.dim() == 2 and w_VH.dim() == 2 and x_TH.shape[1] == w_VH.shape[1], f"{x_TH.shape=} {w_VH.shape=}")
    check(y_T.shape == x_TH.shape[:1], f"{y_T.shape=} is not {x_TH.shape[:1]}")
    check(temperature > 0, f"{temperature=} must be positive")
    return _Reference.apply(x_TH, w_VH, y_T, float(temperature), ignore_index)


# ---------------------------------------------------------------------------------------------- PyTorch reference


def reference(x_TH, w_VH, y_T, temperature=1.0, ignore_index=-100):
    return _Reference.apply(x_TH, w_VH, y_T, float(temperature), ignore_index)


class _Reference(torch.autograd.Function):
    """Chunks of tokens; backward recomputes the logits of a chunk, so no [T,V] tensor ever lives."""

    @staticmethod
    def forward(ctx, x_TH, w_VH, y_T, temperature, ignore_index):
        acc = accumulator(x_TH.dtype)
        kept_N = (y_T != ignore_index).nonzero().squeeze(1)  # ignored rows cost nothing from here on
        logp_T, entropy_T = x_TH.new_zeros(2, len(y_T), dtype=acc)
        w_acc = w_VH.to(acc)
        for rows_C in kept_N.split(_chunk(w_VH.shape[0])):
            logp_CV = _log_softmax(x_TH[rows_C].to(acc), w_acc, temperature)
            logp_T[rows_C] = logp_CV.gather(1, y_T[rows_C, None]).squeeze(1)
            entropy_T[rows_C] = -(logp_CV.exp() * logp_CV).sum(1)
        ctx.save_for_backward(x_TH, w_VH, y_T, kept_N, entropy_T)
        ctx.temperature = temperature
        return logp_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp_T, g_entropy_T):
        x_TH, w_VH, y_T, kept_N, entropy_T = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        acc = accumulator(x_TH.dtype)
        w_acc = w_VH.to(acc)
        dx_TH = torch.zeros_like(x_TH) if needs_dx else None
        dw_VH = torch.zeros_like(w_acc) if needs_dw else None
        for rows_C in kept_N.split(_chunk(w_VH.shape[0])):
            x_CH = x_TH[rows_C].to(acc)
            dz_CV = _log_softmax(x_CH, w_acc, ctx.temperature)
            dz_CV = _dlogits(dz_CV, y_T[rows_C], g_logp_T[rows_C], g_entropy_T[rows_C], entropy_T[rows_C])
            dz_CV /= ctx.temperature
            if needs_dx:
                dx_TH[rows_C] = (dz_CV @ w_acc).to(x_TH.dtype)
            if needs_dw:
                dw_VH.addmm_(dz_CV.T, x_CH)
        return dx_TH, dw_VH.to(w_VH.dtype) if needs_dw else None, None, None, None


def _chunk(vocab):
    """Rows a chunk: 8 MB of fp32 logits for a small vocabulary, at least 256 so that products stay efficient."""
    return max(256, 2**21 // vocab)


def _log_softmax(x_CH, w_VH, temperature):
    return (x_CH @ w_VH.T).div_(temperature).log_softmax(1)


def _dlogits(logp_CV, y_C, g_logp_C, g_entropy_C, entropy_C):
    """d/dz of g_logp * logp[y] + g_entropy * entropy: g_logp (onehot - p) - g_entropy p (log p + entropy)."""
    p_CV = logp_CV.exp()
    dz_CV = logp_CV.add_(entropy_C[:, None]).mul_(-g_entropy_C[:, None]).sub_(g_logp_C[:, None]).mul_(p_CV)
    return dz_CV.scatter_add_(1, y_C[:, None], g_logp_C[:, None])
