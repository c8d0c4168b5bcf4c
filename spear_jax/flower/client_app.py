"""The ClientApp: what Flower starts on a node, once for every message."""

import traceback
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from spear_jax import __version__
from spear_jax.core.errors import UserError
from spear_jax.flower import PROTOCOL, STAGES

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Tells the server which client this node is; nothing is built for that."""
    client = context.node_config.get("client", -1)
    told = ConfigRecord({"protocol": PROTOCOL, "version": __version__, "client": client})
    return Message(RecordDict({"hello": told}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains a round. Errors are told on this node alone: a message of one may quote an example."""
    from spear_jax.flower import node

    def answer() -> RecordDict:
        return node.answer(message.content, context.node_config, context.run_config)

    return Message(_told(answer), reply_to=message)


def of_secure_sum(stage: str) -> Callable[[Message, Context], Message]:
    """Returns what answers a stage of a secure sum."""

    def answer(message: Message, context: Context) -> Message:
        from spear_jax.flower import secure, terms

        folder = terms.folder_of(context.node_config)
        return Message(
            _told(lambda: secure.answer(stage, message.content, folder)), reply_to=message
        )

    return answer


for _stage in STAGES:
    app.train(_stage)(of_secure_sum(_stage))


def _told(answer: Callable[[], RecordDict]) -> RecordDict:
    """What the server gets. Errors are told on this node alone: a message may quote an example."""
    from spear_jax.flower.records import Refused, write_refusal

    try:
        return answer()
    except Refused as refused:
        print(f"error: the server's request is refused: {refused}", flush=True)
        return write_refusal(str(refused))
    except UserError as error:
        print(f"error: {error}", flush=True)
        return write_refusal("the node is set up wrongly; its log says how")
    except Exception as error:
        traceback.print_exc()
        return write_refusal(f"{type(error).__name__} on the node; its log has more")
