"""People at their own devices teach clients on nodes of Flower, and no text leaves a device.

python -m pytest -m slow tests/commands/test_flower_live.py       # minutes
"""

import contextlib
import gzip
import json

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install -e .[flower]")
pytest.importorskip("httpx", reason="live feedback needs pip install -e .[live]")
pytest.importorskip("uvicorn", reason="live feedback needs pip install -e .[live]")

from deployment import Deployment, Relay
from people import TASK, Person, serve
from run_sizes import SMALL

import spear_jax as sj

pytestmark = pytest.mark.slow
FIELDS = {
    "rounds": 1,
    "record_traces": True,
    "federation.num_clients": 2,
    "federation.clients_per_round": 2,
    "rollout.feedback": "oracle",  # of the server, which asks nobody
    "feedback.asks": "verdict",
}


def test_a_person_teaches_on_each_of_two_nodes_and_no_text_crosses_the_wire(tmp_path):
    config = sj.preset("spear", task="few_facts", model="tiny", variants=["live"])
    config.update_from_flattened_dict(SMALL | FIELDS)
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(Deployment(tmp_path / "real", nodes=0))
        relays, people = [], []
        for client in range(2):
            url, tokens = stack.enter_context(serve(tmp_path / f"service{client}", "--people=1"))
            people.append(Person(url, tokens["person-0"], TASK.generate("train")))
            people[-1].start()
            stack.callback(people[-1].join, 30)
            stack.callback(people[-1].done.set)
            relays.append(Relay(there.port))
            own = f'rollout.feedback="service" feedback.url="{url}"'
            token = {"SPEAR_FEEDBACK_TOKEN": tokens["trainer"]}
            there.start_node(client, own, port=relays[-1].port, **token)
        there.run(config, tmp_path / "server", deadline=600.0)
    (line,) = read(tmp_path / "server/metrics.jsonl")[1:]
    assert line["round/clients"] == 2 and line["feedback/answered"] == line["feedback/asked"] > 0
    texts = set()
    for client, person in enumerate(people):
        (folder,) = (tmp_path / f"real/node{client}").glob("*/traces")
        said = [x for x in read(folder.parent / "feedback.jsonl") if "answered" in x]
        assert person.ids and sorted(x["id"] for x in said) == sorted(person.ids)
        texts |= {text for x in said for text in x.values() if isinstance(text, str)}
        for trace in read(folder / "round_00001.jsonl.gz"):
            assert trace["client"] == client
            texts |= {trace["prompt"], trace["y0"], *trace["options"].values()}
            texts |= {text for x in trace["revisions"] for text in (x["feedback"], x["text"])}
    wire = b"\n".join(bytes(seen) for relay in relays for seen in relay.seen)
    assert b"feedback/asked" in wire and len(wire) > line["flower/bytes_up"]  # it can be read
    texts = {text for text in texts if text and len(text) > 3}
    assert len(texts) > 20 and not [text for text in texts if text.encode() in wire]


def read(file):
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    return list(map(json.loads, data.splitlines()))
