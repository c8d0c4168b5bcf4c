"""The tables of the service."""

import sqlalchemy as sa

meta = sa.MetaData()
NAME = sa.String(64)

users = sa.Table(
    "users",
    meta,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),  # SHA-256 of the token
    sa.Column("scopes", sa.String(64), nullable=False),  # joined by commas
    sa.Column("client", sa.Integer),
)
runs = sa.Table(
    "runs",
    meta,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("clients", sa.Integer, nullable=False),
    sa.Column("rounds", sa.Integer, nullable=False),
    sa.Column("asks", sa.String(16), nullable=False),
    sa.Column("show_right", sa.Boolean, nullable=False),
    sa.Column("examples", sa.Text, nullable=False),  # JSON
    sa.Column("opened", sa.Double, nullable=False),  # the newest is the current run
    sa.Column("cursor", sa.BigInteger, nullable=False),  # of the newest delivery or chat
    sa.Column("collected", sa.BigInteger, nullable=False),  # the trainer has seen up to here
)
rounds = sa.Table(
    "rounds",
    meta,
    sa.Column("run", sa.String(200), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("deadline", sa.Double),
    sa.Column("wanted", sa.Integer),
    sa.Column("accuracy", sa.Double),
    sa.Column("question", sa.Text),  # of the sample
    sa.Column("answer", sa.Text),
)
requests = sa.Table(
    "requests",
    meta,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("run", sa.String(200), nullable=False),
    sa.Column("id", NAME, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),  # of the content
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("client", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("question", sa.Text, nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("right", sa.Text),
    sa.Column("adapter", sa.String(200), nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("voices", sa.Integer, nullable=False),  # how many people are asked
    sa.Column("given", sa.Integer, nullable=False),  # how many have answered
    sa.Column("free", sa.Integer, nullable=False),  # voices less given less leased
    sa.Column("closed", sa.Boolean, nullable=False),  # its round has ended
    sa.Column("done", sa.Boolean, nullable=False),  # delivered
    sa.Column("open", sa.Boolean, nullable=False),  # may be leased
    sa.UniqueConstraint("run", "id"),
    sa.Index("requests_of_all", "run", "open", "round", "key"),
    sa.Index("requests_of_a_client", "run", "open", "client", "round", "key"),
    sa.Index("requests_of_a_round", "run", "round", "done", "closed"),
)
leases = sa.Table(
    "leases",
    meta,
    sa.Column("who", NAME, primary_key=True),
    sa.Column("request", sa.Integer, nullable=False, index=True),
    sa.Column("since", sa.Double, nullable=False),
    sa.Column("expires", sa.Double, nullable=False, index=True),
)
# Who did what: the audit log, and the answers themselves (what = "answer").
log = sa.Table(
    "log",
    meta,
    sa.Column("key", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("who", NAME, nullable=False),
    sa.Column("what", sa.String(16), nullable=False),
    sa.Column("run", sa.String(200)),
    sa.Column("round", sa.Integer),
    sa.Column("request", sa.Integer),
    sa.Column("verdict", sa.String(8)),
    sa.Column("hint", sa.Text),
    sa.Column("seconds", sa.Double),
    sa.Column("late", sa.Boolean),
    sa.Column("undone", sa.Boolean),
    sa.Column("note", sa.Text),
    sa.Index("log_of_a_request", "request", "who", "what"),
    sa.Index("log_of_a_person", "who", "what", "run", "key"),
)
# What the trainer gets: one resolved answer a request, in the order of the cursor.
deliveries = sa.Table(
    "deliveries",
    meta,
    sa.Column("run", sa.String(200), primary_key=True),
    sa.Column("cursor", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("request", sa.Integer, nullable=False, index=True),
    sa.Column("verdict", sa.String(8)),
    sa.Column("hint", sa.Text),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("late", sa.Boolean, nullable=False),
    sa.Column("undone", sa.Boolean, nullable=False),
)
chats = sa.Table(
    "chats",
    meta,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("run", sa.String(200), nullable=False),
    sa.Column("who", NAME, nullable=False),
    sa.Column("client", sa.Integer, nullable=False),
    sa.Column("question", sa.Text, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("pending", sa.Boolean, nullable=False),  # a job waits for the trainer
    sa.Column("revised", sa.Boolean, nullable=False),  # a revision was asked for
    sa.Column("cursor", sa.BigInteger),  # from the first answer's verdict on
    *(
        sa.Column(f"{which}{name}", kind)
        for which in ("", "revision_")
        for name, kind in (
            ("answer", sa.Text),
            ("error", sa.Text),
            ("adapter", sa.String(200)),
            ("verdict", sa.String(8)),
            ("hint", sa.Text),
        )
    ),
    sa.Index("chats_that_wait", "run", "pending", "key"),
    sa.Index("chats_of_a_cursor", "run", "cursor"),
)
webhooks = sa.Table(
    "webhooks",
    meta,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("secret", sa.String(64), nullable=False),
)
