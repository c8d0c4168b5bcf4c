"""The ClientApp: what Flower starts on a node, once for every message. It imports no JAX."""

import traceback
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from spear_jax import __version__
from spear_jax.core.errors import UserError
from spear_jax.flower import PROTOCOL, STAGES, worker
from spear_jax.flower.records import Refused, write_refusal
from spear_jax.flower.terms import WRONG_NODE, folder_of

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Tells the server which client this node is; nothing is built for that."""
    client = context.node_config.get("client", -1)
    told = ConfigRecord({"protocol": PROTOCOL, "version": __version__, "client": client})
    return Message(RecordDict({"hello": told}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Has the worker train a round."""

    def answer() -> RecordDict:
        return worker.ask(message.content, context.node_config, context.run_config)

    return Message(_told(answer), reply_to=message)


def of_secure_sum(stage: str) -> Callable[[Message, Context], Message]:
    """Returns what answers a stage of a secure sum."""

    def answer(message: Message, context: Context) -> Message:
        from spear_jax.flower import secure

        def reply() -> RecordDict:
            return secure.answer(stage, message.content, folder_of(context.node_config))

        return Message(_told(reply), reply_to=message)

    return answer


for _stage in STAGES:
    app.train(_stage)(of_secure_sum(_stage))


def _told(answer: Callable[[], RecordDict]) -> RecordDict:
    """What the server gets. Errors are told on this node alone: a message may quote an example."""
    try:
        return answer()
    except worker.Lost:  # becomes an error of Flower's: the client is lost
        raise
    except Refused as refused:
        print(f"error: the server's request is refused: {refused}", flush=True)
        return write_refusal(str(refused))
    except UserError as error:
        print(f"error: {error}", flush=True)
        return write_refusal(WRONG_NODE)
    except Exception as error:
        traceback.print_exc()
        return write_refusal(f"{type(error).__name__} on the node; its log has more")
