"""The rival: a user's other way to run the same work.

It is transformers' `generate`, a PEFT adapter beside the base, torch's AdamW, and clients one after
another. Prompts, completions, rows, token counts, dtype, weights and adapter are those of our side.
As in the published SPEAR code, wins and loses have a forward and backward of their own with
full-vocabulary logits, and a question is scored once for each option.

Nothing here imports JAX, whose memory would count as the rival's. torch is imported when the rival
is built.
"""

import importlib.util
import pathlib
import tempfile
import warnings
from typing import Any

from spear_jax.benchmark import machine
from spear_jax.benchmark.side import Side
from spear_jax.benchmark.workload import Row, Workload, random_tensor
from spear_jax.core.errors import UserError

LIBRARIES = ("torch", "transformers", "peft")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Measured = dict[str, Any]


def require() -> None:
    """Raises UserError where a library is missing."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--against=hf needs {' and '.join(missing)}, which this environment lacks; `pip "
            f'install "spear-jax[torch]"`.'
        )


def build(work: Workload) -> Side:
    """Loads or makes the weights on the machine's device, and binds the phases."""
    require()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' remarks to each other
    rival = Rival(work)
    torch = rival.torch

    def finished(phase):
        def run() -> Measured:
            measured = phase()
            if rival.device == "cuda":
                torch.cuda.synchronize()
            return measured

        return run

    names = (
        "rollout",
        "revision",
        "evaluation",
        "local_step",
        "aggregation",
        "checkpoint",
        "round",
    )
    return Side(
        {name: finished(getattr(rival, name)) for name in names},
        torch.cuda.max_memory_allocated if rival.device == "cuda" else None,
    )


class Rival:
    """The tuned model and the phases.

    A phase takes the global adapter as it was built.
    """

    def __init__(self, work: Workload):
        import peft
        import torch
        import transformers

        torch.set_num_threads(machine.cores())
        torch.set_float32_matmul_precision("high")  # TF32 where the card has it, as JAX's default
        if work.platform == "gpu" and not torch.cuda.is_available():
            raise UserError(
                "JAX runs on a GPU and torch finds none; install torch for this GPU, or leave "
                "out --against=hf."
            )
        transformers.utils.logging.disable_progress_bar()
        self.work, self.preset = work, work.preset
        self.torch, self.peft, self.transformers = torch, peft, transformers
        self.device = "cuda" if work.platform == "gpu" else "cpu"
        preset = work.preset
        settings = peft.LoraConfig(
            r=preset.rank,
            lora_alpha=2 * preset.rank,
            lora_dropout=0.0,
            target_modules=MODULES,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(self.base(), settings)
        if preset.rival_remat:
            # without it nothing would flow back through the recomputed layers
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        self.model = model.to(self.device)
        self.start = {
            name: torch.from_numpy(
                random_tensor(name[name.index("layers.") :], tuple(value.shape))
            ).to(self.device)
            for name, value in self.adapter().items()
        }
        self.set_adapter(self.start)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.folder = tempfile.TemporaryDirectory()

    def base(self):
        """Returns the model, from its folder or with random weights."""
        preset, torch, transformers = self.preset, self.torch, self.transformers
        family, dtype = transformers.AutoModelForCausalLM, getattr(torch, preset.dtype)
        if preset.model:
            return family.from_pretrained(preset.model, dtype=dtype)
        with torch.device(
            self.device
        ):  # its own first weights are drawn there, in no time on a GPU
            config = transformers.AutoConfig.for_model(**preset.shape)
            model = family.from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(random_tensor(name, tuple(parameter.shape))))
        return model

    def adapter(self) -> dict[str, Any]:
        """Returns the adapter's tensors by PEFT's names; they are the model's own."""
        return self.peft.get_peft_model_state_dict(self.model)

    def set_adapter(self, tensors: dict[str, Any]) -> None:
        with self.torch.no_grad():
            for name, value in self.adapter().items():
                value.copy_(tensors[name])

    def padded(self, rows: list[list[int]], left: bool) -> dict[str, Any]:
        """Returns input_ids and attention_mask, int64[B, T], padded to the longest row.

        Rows [5, 6] and [7] on the left, as generation takes them:

            input_ids       5 6    attention_mask  1 1
                            0 7                    0 1
        """
        width = max(map(len, rows))
        fill = [[0] * (width - len(row)) for row in rows]
        pairs = list(zip(rows, fill, strict=True))
        ids = [gap + row if left else row + gap for row, gap in pairs]
        mask = [
            [0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap)
            for row, gap in pairs
        ]
        tensor = lambda values: self.torch.tensor(values, device=self.device)
        return {"input_ids": tensor(ids), "attention_mask": tensor(mask)}

    def generate(self, prompts: list[list[list[int]]]) -> Measured:
        """Generates client by client, the adapter unmerged."""
        new, sample = self.preset.new_tokens, self.preset.temperature > 0
        how = (
            {"temperature": self.preset.temperature, "top_p": self.preset.top_p, "top_k": 0}
            if sample
            else {}
        )
        config = self.transformers.GenerationConfig(
            do_sample=sample, min_new_tokens=new, max_new_tokens=new, pad_token_id=0, **how
        )
        self.model.eval()
        answers = []
        for client in prompts:
            inputs = self.padded(client, left=True)
            done = self.model.generate(**inputs, generation_config=config)
            answers += done[:, inputs["input_ids"].shape[1] :].tolist()
        return {"answers": answers}

    def rollout(self) -> Measured:
        self.set_adapter(self.start)
        return self.generate(self.work.prompts)

    def revision(self) -> Measured:
        self.set_adapter(self.start)
        return self.generate(self.work.revisions)

    def evaluation(self) -> Measured:
        """Scores every question once for each option, with full logits."""
        self.set_adapter(self.start)
        self.model.eval()
        choices = []
        with self.torch.no_grad():
            for question in self.work.questions:
                inputs = self.padded(
                    [[*question, option] for option in self.work.options], left=False
                )
                logprobs = self.model(**inputs).logits[:, :-1].float().log_softmax(-1)
                picked = logprobs.gather(-1, inputs["input_ids"][:, 1:, None])[:, -1, 0]
                choices.append(int(picked.argmax()))
        return {"choices": choices}

    def update(self, steps: list[list[Row]]) -> Measured:
        """Runs a client's round from the global adapter, one AdamW step for each list of rows.

        Returns: the mean loss.
        """
        torch = self.torch
        self.set_adapter(self.start)
        optimiser = torch.optim.AdamW(self.trainable, lr=self.preset.rate, weight_decay=0.0)
        self.model.train()
        loss = 0.0
        for rows in steps:
            optimiser.zero_grad()
            for part in (self.win_loss, self.lose_loss):
                share = part(rows)
                share.backward()
                loss += float(share.detach()) / len(steps)
            torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
            optimiser.step()
        return {"loss": loss}

    def win_loss(self, rows: list[Row]):
        """Returns the cross entropy of the wins' completions, by the model's own loss."""
        inputs, mask = self.batch([row for row in rows if row.label > 0])
        labels = inputs["input_ids"].masked_fill(~mask, -100)
        return self.model(**inputs, labels=labels, use_cache=False).loss

    def lose_loss(self, rows: list[Row]):
        """Returns λ Σ c 1[p > ξ] (−log(1 − p)) / Σ 1 over the loses' completion tokens."""
        rows = [row for row in rows if row.label < 0]
        inputs, mask = self.batch(rows)
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
        targets, mask = inputs["input_ids"][:, 1:, None], mask[:, 1:]
        p = logits.log_softmax(-1).gather(-1, targets)[..., 0].exp().clamp(max=1 - 1e-7)
        confidence = self.torch.tensor([row.confidence for row in rows], device=self.device)[
            :, None
        ]
        unlikelihood_mask = mask & (p > self.preset.margin)
        values = self.torch.where(unlikelihood_mask, -(1 - p + 1e-8).log() * confidence, 0.0)
        return self.preset.lose_weight * values.sum() / mask.sum()

    def batch(self, rows: list[Row]) -> tuple[dict[str, Any], Any]:
        """Returns right-padded rows, and bool[B, T], their completion tokens."""
        inputs = self.padded([row.prompt + row.completion for row in rows], left=False)
        places = self.torch.arange(inputs["input_ids"].shape[1], device=self.device)[None]
        begin = self.torch.tensor([[len(row.prompt)] for row in rows], device=self.device)
        return inputs, (places >= begin) & inputs["attention_mask"].bool()

    def local_step(self) -> Measured:
        return self.update(self.work.rows[0][:1])

    def aggregation(self) -> Measured:
        self.set_adapter(self.mean([self.start] * self.preset.clients))
        return {}

    def mean(self, adapters: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the adapters' mean, tensor by tensor, with equal weights."""
        weight = 1.0 / len(adapters)
        return {name: sum(weight * x[name] for x in adapters) for name in adapters[0]}

    def checkpoint(self) -> Measured:
        self.torch.save(self.adapter(), pathlib.Path(self.folder.name) / "adapter.pt")
        return {}

    def round(self) -> Measured:
        """Runs answers and revisions of every client, then every client's steps, then the mean."""
        self.set_adapter(self.start)
        for prompts, revisions in zip(self.work.prompts, self.work.revisions, strict=True):
            self.generate([prompts])
            self.generate([revisions])
        trained, loss = [], 0.0
        for steps in self.work.rows:
            loss += self.update(steps)["loss"] / self.preset.clients
            trained.append({name: value.clone() for name, value in self.adapter().items()})
        self.set_adapter(self.mean(trained))
        return {"loss": loss}
