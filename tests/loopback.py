"""Flower's apps in one process: real messages, taken apart into bytes and put together again.

A node's worker is no process here: tests/commands/test_flower_worker.py has those.

Imported by tests that have made sure of flwr.
"""

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from spear_jax.flower.client_app import app as client_app
from spear_jax.flower.node import Answers

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1


class Loopback(Grid):
    """A grid whose nodes answer at once.

    Args:
        nodes: each one's node config; a node's id is its place + 1.
        run_config: of the app.
        change: (node, message type, reply) -> the reply that arrives; None: none does.
    """

    def __init__(self, nodes, run_config, change=lambda node, kind, reply: reply):
        self.nodes = {
            place + 1: Context(1, place + 1, own, RecordDict(), run_config)
            for place, own in enumerate(nodes)
        }
        self.answers = {
            node: Answers(at.node_config, run_config) for node, at in self.nodes.items()
        }
        self.change, self.replies, self.wire = change, {}, []

    def set_run(self, run):
        raise NotImplementedError

    run = property(set_run)

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            arrived = self.carry(message)
            reply = self.answer(arrived, node)
            reply = self.change(node, message.metadata.message_type, reply)
            ids.append(arrived.metadata.message_id)
            if reply is not None:
                self.replies[ids[-1]] = reply if reply.has_error() else self.carry(reply)
        return ids

    def answer(self, message, node):
        if message.metadata.message_type == "train":
            return Message(self.answers[node].reply(message.content), reply_to=message)
        return client_app(message, self.nodes[node])

    def pull_messages(self, message_ids):
        return [self.replies.pop(name) for name in message_ids if name in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def carry(self, message):
        """The message behind the wire; its bytes are kept."""
        contents = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        self.wire += contents.values()
        name = get_object_id(message.deflate())
        arrived = inflate_object_from_contents(name, contents)
        assert isinstance(arrived, Message)
        arrived.metadata.__dict__["_message_id"] = name
        return arrived
