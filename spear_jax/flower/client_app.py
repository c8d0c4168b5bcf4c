"""The ClientApp: what Flower starts on a node, once for every message. It imports no JAX."""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from spear_jax import __version__
from spear_jax.core.errors import UserError
from spear_jax.flower import PROTOCOL, worker
from spear_jax.flower.terms import WRONG_NODE

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Tells the server which client this node is; nothing is built for that."""
    client = context.node_config.get("client", -1)
    told = ConfigRecord({"protocol": PROTOCOL, "version": __version__, "client": client})
    return Message(RecordDict({"hello": told}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Has the worker train a round. One that is lost becomes an error of Flower's."""
    try:
        records = worker.ask(message.content, context.node_config, context.run_config)
    except UserError as error:
        from spear_jax.flower.messages import write_refusal  # imports JAX

        print(f"error: {error}", flush=True)
        records = write_refusal(WRONG_NODE)
    return Message(records, reply_to=message)
