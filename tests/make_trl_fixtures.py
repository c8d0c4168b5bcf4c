"""Makes tests/fixtures/trl.json again, with TRL as the oracle: `python tests/make_trl_fixtures.py`.

Needs torch and TRL. What runs is TRL's own: `DPOTrainer` and `GRPOTrainer` are built by their
constructors on the model of fixtures/llama, and every number comes out of their `training_step`
(with `_prepare_inputs`, `compute_loss`, the division for gradient accumulation and the backward
pass) or, for advantages, out of `GRPOTrainer._generate_and_score_completions`.

What is supplied: the policy and DPO's reference are `Given`, a module that hands out fixed float64
log-probabilities where a language model would compute them (as TRL's fused LM head does: 0 where a
label is -100); GRPO's sampled batch (ids, masks, advantages, old and reference log-probabilities,
num_items_in_batch) stands in the trainer's own buffer, so that nothing is sampled; for advantages
the tiny model samples, and the rewards are given.

trl.json: {"versions", "dpo": {arrays, "cases"}, "grpo": {arrays, "cases"}, "advantages":
{"rewards", group, batch, none}}. A case holds TRL's settings, the rows (DPO: pairs) of a
micro-batch, and per optimiser step its loss and the gradient with respect to the policy's
log-probabilities.
"""

import json
import pathlib
import tempfile

import datasets
import numpy as np
import torch
import transformers
import trl
from trl.trainer.utils import FusedCausalLMOutput

FOLDER = pathlib.Path(__file__).parent / "fixtures"
PROMPT = 2  # tokens; the first one names the row
LENGTH = 5  # T
ACCUMULATION = 2

DPO_LENGTHS = [[5, 3, 1, 4], [2, 5, 4, 0]]  # chosen, rejected
DPO = {  # name: (settings, pairs of a micro-batch)
    "sigmoid": ({"loss_type": ["sigmoid"], "beta": 0.5}, 2),
    "sigmoid with a small beta": ({"loss_type": ["sigmoid"], "beta": 0.1}, 2),
    "hinge": ({"loss_type": ["hinge"], "beta": 0.5}, 2),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.5}, 2),
    # TRL's sigmoid takes no smoothing. aot is smoothed, and on one pair its sorting does nothing.
    "smoothed": ({"loss_type": ["aot"], "beta": 0.5, "label_smoothing": 0.2}, 1),
}

GRPO_LENGTHS = [5, 3, 1, 4, 2, 5, 0, 3]
PLAIN = {
    "num_iterations": 2,
    "use_bias_correction_kl": False,
}  # TRL's default is True; two cases have it
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28, **PLAIN}
DAPO = {"loss_type": "dapo", "beta": 0.3, **CLIP}
CISPO = {"loss_type": "cispo", "epsilon_high": 1.2, **PLAIN}
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence", **CLIP}
# with one iteration on one sampling TRL keeps no old log-probabilities: they are the policy's own
OWN, CORRECTED = {"num_iterations": 1}, {"use_bias_correction_kl": True}
GRPO = {  # name: (settings, rows of a micro-batch)
    **{
        f"{kind}{' with a reference' if beta else ''}": (
            {"loss_type": kind, "beta": beta, **CLIP},
            4,
        )
        for kind in ("grpo", "bnpo", "dapo", "dr_grpo")
        for beta in (0.0, 0.3)
    },
    "cispo": ({**CISPO, "beta": 0.0}, 4),
    "cispo with a reference": ({**CISPO, "beta": 0.3}, 4),
    "sequence": ({**SEQUENCE, "beta": 0.0}, 4),
    "sequence with a reference": ({**SEQUENCE, "beta": 0.3}, 4),
    "dapo on its own samples": ({**DAPO, **OWN}, 4),
    "dapo with a reference and corrected KL": ({**DAPO, **CORRECTED}, 4),
    "dapo on its own samples with corrected KL": ({**DAPO, **OWN, **CORRECTED}, 4),
    "dapo, two steps on one sampling": (DAPO, 2),
}
LONGEST = 7  # max_completion_length, which only dr_grpo reads

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.0, 2.0, 0.25, 0.0]]  # exact in float32


def lengths_mask(lengths) -> np.ndarray:
    return np.arange(LENGTH) < np.array(lengths)[..., None]


def dpo_arrays() -> dict[str, np.ndarray]:
    """logprobs, reference float64[2, pairs, T] and mask; chosen first. Margins of both signs and on
    both sides of 1.
    """
    rng = np.random.default_rng(3)
    mask = lengths_mask(DPO_LENGTHS)
    logprobs = rng.uniform(-4.0, -0.05, mask.shape).round(6)
    return {
        "logprobs": logprobs,
        "reference": (logprobs + rng.normal(0, 1.2, mask.shape)).round(6),
        "mask": mask,
    }


def grpo_arrays() -> dict[str, np.ndarray]:
    """logprobs, old, reference float64[rows, T], mask, advantage. Ratios, and sequences' too,
    beyond the clip on both sides.
    """
    rng = np.random.default_rng(172)
    mask = lengths_mask(GRPO_LENGTHS)
    logprobs = rng.uniform(-4.0, -0.05, mask.shape).round(6)
    return {
        "logprobs": logprobs,
        "old": (logprobs + rng.normal(0, 0.5, mask.shape)).round(6),
        "reference": (logprobs + rng.normal(0, 0.5, mask.shape)).round(6),
        "mask": mask,
        "advantage": np.array([1.3, -0.7, -1.1, 0.4, 0.9, -1.5, 0.8, 0.0]),
    }


class Given(torch.nn.Module):
    """Log-probabilities in a language model's place.

    Args: logprobs: float64[rows, T]; a prompt's first token says which row is asked for.
    """

    def __init__(self, logprobs: np.ndarray):
        super().__init__()
        self.logprobs = torch.nn.Parameter(torch.tensor(logprobs))

    def forward(self, input_ids, labels, **_):
        scored = labels[:, 1:] != -100
        full = torch.nn.functional.pad(self.logprobs[input_ids[:, 0]], (PROMPT - 1, 0))
        zero = torch.zeros_like(full)
        return FusedCausalLMOutput(
            log_probs=full.masked_fill(~scored, 0),
            entropy=zero,
            mean_logits=zero,
            is_top1=scored,
            label_mask=scored,
        )


def prompts(rows) -> torch.Tensor:
    """int64[rows, PROMPT]."""
    return torch.stack([torch.as_tensor(rows), torch.ones(len(rows), dtype=torch.long)], 1)


def common(size: int) -> dict:
    return {
        "per_device_train_batch_size": size,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_steps(trainer, policy: Given, batches: list, accumulation: int) -> list[dict]:
    """TRL's training steps on micro-batches; per optimiser step its loss and gradient."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = (
        accumulation  # Trainer.train's inner loop would set it
    )
    steps = []
    for start in range(0, len(batches), accumulation):
        policy.zero_grad()
        parts = [
            trainer.training_step(policy, batch, None)
            for batch in batches[start : start + accumulation]
        ]
        steps.append({"loss": float(sum(parts)), "grad": policy.logprobs.grad.tolist()})
    return steps


def run_dpo(settings: dict, size: int) -> list[dict]:
    """One optimiser step over all pairs. The gradient has the chosen rows first."""
    arrays = dpo_arrays()
    pairs = arrays["mask"].shape[1]
    policy, reference = (
        Given(arrays[name].reshape(-1, LENGTH)) for name in ("logprobs", "reference")
    )
    mask = torch.tensor(arrays["mask"].reshape(-1, LENGTH)).long()
    batches = []
    for start in range(0, pairs, size):
        rows = torch.tensor([side * pairs + start + i for side in range(2) for i in range(size)])
        own, ids = mask[rows], prompts(rows)
        batches.append(
            {
                "input_ids": torch.cat([ids, 2 * torch.ones_like(own)], 1),
                "attention_mask": torch.cat([torch.ones_like(ids), own], 1),
                "completion_mask": torch.cat([torch.zeros_like(ids), own], 1),
            }
        )
    with tempfile.TemporaryDirectory() as folder:
        model = str(FOLDER / "llama")
        args = trl.DPOConfig(output_dir=folder, **common(size), **settings)
        data = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        trainer = trl.DPOTrainer(model, args=args, train_dataset=data)
        trainer.ref_model = reference
        return run_steps(trainer, policy, batches, len(batches))


def grpo_trainer(folder: str, rewards, **settings):
    args = trl.GRPOConfig(output_dir=folder, max_completion_length=LONGEST, **settings)
    data = datasets.Dataset.from_dict({"prompt": ["a"] * 8})
    return trl.GRPOTrainer(str(FOLDER / "llama"), rewards, args, train_dataset=data)


def run_grpo(settings: dict, size: int) -> list[dict]:
    """Micro-batches of `size` rows in order, two to an optimiser step, all from one sampling."""
    arrays = {name: torch.tensor(array) for name, array in grpo_arrays().items()}
    policy, mask = Given(arrays["logprobs"].numpy()), arrays["mask"].long()
    count = len(mask) // size
    with tempfile.TemporaryDirectory() as folder:
        own = common(size) | {
            "gradient_accumulation_steps": ACCUMULATION,
            "steps_per_generation": count,
        }
        trainer = grpo_trainer(folder, lambda **_: [], **own, **settings, num_generations=2)
        rows = [
            torch.arange(len(mask))[start : start + size] for start in range(0, len(mask), size)
        ]
        trainer._buffered_inputs = [
            {
                "prompt_ids": prompts(index),
                "prompt_mask": torch.ones(size, PROMPT, dtype=torch.long),
                "completion_ids": torch.full((size, LENGTH), 2),
                "completion_mask": mask[index],
                "advantages": arrays["advantage"][index],
                "num_items_in_batch": mask.sum(),
                "old_per_token_logps": arrays["old"][index]
                if settings["num_iterations"] > 1
                else None,
                "ref_per_token_logps": arrays["reference"][index],
            }
            for index in rows
        ]
        trainer.num_iterations, trainer._step = (
            2,
            count,
        )  # as at a second iteration: the buffer is used again
        return run_steps(trainer, policy, [{}] * count, ACCUMULATION)


def run_advantages(scaling: str) -> list[list[float]]:
    """float32[groups, G] of REWARDS, by what scores sampled completions."""
    flat = [reward for group in REWARDS for reward in group]
    with tempfile.TemporaryDirectory() as folder:
        own = common(len(flat)) | {"num_generations": len(REWARDS[0]), "scale_rewards": scaling}
        trainer = grpo_trainer(folder, lambda **_: flat, **own)
        trainer.model.train()
        scored = trainer._generate_and_score_completions([{"prompt": "a"}] * len(flat))
        return scored["advantages"].reshape(len(REWARDS), -1).tolist()


def case(run, settings: dict, size: int) -> dict:
    return {"settings": settings, "micro": size, "steps": run(settings, size)}


def make() -> dict:
    """What trl.json holds."""
    listed = lambda arrays: {name: array.tolist() for name, array in arrays.items()}
    return {
        "versions": {module.__name__: module.__version__ for module in (trl, torch, transformers)},
        "dpo": {
            **listed(dpo_arrays()),
            "cases": {name: case(run_dpo, *made) for name, made in DPO.items()},
        },
        "grpo": {
            **listed(grpo_arrays()),
            "cases": {name: case(run_grpo, *made) for name, made in GRPO.items()},
        },
        "advantages": {"rewards": REWARDS}
        | {how: run_advantages(how) for how in ("group", "batch", "none")},
    }


if __name__ == "__main__":
    (FOLDER / "trl.json").write_text(json.dumps(make()) + "\n", encoding="utf-8")
