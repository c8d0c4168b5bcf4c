"""The ClientApp: what Flower starts on a node, once for every message."""

import traceback

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from spear_jax import __version__
from spear_jax.core.errors import UserError
from spear_jax.flower import PROTOCOL

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
    from spear_jax.flower import messages, node

    try:
        records = node.answer(message.content, context.node_config, context.run_config)
    except messages.Refused as refused:
        print(f"error: the server's request is refused: {refused}", flush=True)
        records = messages.write_refusal(str(refused))
    except UserError as error:
        print(f"error: {error}", flush=True)
        records = messages.write_refusal("the node is set up wrongly; its log says how")
    except Exception as error:
        traceback.print_exc()
        records = messages.write_refusal(f"{type(error).__name__} on the node; its log has more")
    return Message(records, reply_to=message)
