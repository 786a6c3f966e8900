"""The order desk: a small shop in an in-memory SQLite database, and an agent's tools for it.

    desk = Desk.create(seed=7)                      # deterministic: the same seed gives the same shop
    desk.call("lookup_order", {"order_id": 1042})   # JSON text, as an agent sees it

The tools are real: queries read the database, `update_order` modifies it. A failing call returns {"error": ...} and
never raises.
"""

from __future__ import annotations

import ast
import json
import operator
import random
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

SCHEMA = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, email TEXT, city TEXT, tier TEXT);
CREATE TABLE products (sku TEXT PRIMARY KEY, name TEXT, price REAL, stock INTEGER, warehouse TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, status TEXT, placed TEXT, total REAL);
CREATE TABLE items (order_id INTEGER, sku TEXT, quantity INTEGER, price REAL);
CREATE TABLE shipments (order_id INTEGER PRIMARY KEY, carrier TEXT, tracking TEXT, status TEXT, eta TEXT);
"""

STATUSES = ["pending", "packed", "shipped", "delivered", "cancelled"]
MONEY = 2  # decimals


class Lexicon(NamedTuple):
    """The proper names used in a shop."""

    first_names: Sequence[str]
    last_names: Sequence[str]
    cities: Sequence[str]
    products: Sequence[str]
    carriers: Sequence[str]

    @classmethod
    def invented(cls, rng: random.Random) -> Lexicon:
        """As many names as USUAL, all made up, so that a model must copy names instead of memorizing them."""

        def words(like: Sequence[str]) -> list[str]:
            return ["".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize() for _ in like]

        first, last, cities, products, carriers = (words(names) for names in USUAL)
        return cls(first, last, cities, [name.lower() for name in products], carriers)


USUAL = Lexicon(
    first_names=("Ada", "Bruno", "Carla", "David", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luca"),
    last_names=("Adler", "Becker", "Costa", "Duarte", "Evans", "Fischer", "Garcia", "Haas", "Ito", "Jansen", "Klein"),
    cities=("Lisbon", "Vienna", "Oslo", "Turin", "Porto", "Ghent", "Lyon", "Zurich"),
    products=(
        "desk lamp",
        "office chair",
        "notebook set",
        "monitor arm",
        "keyboard",
        "headset",
        "webcam",
        "paper tray",
    ),
    carriers=("DHL", "UPS", "FedEx", "GLS"),
)
SYLLABLES = [
    consonant + rest for consonant in "bdfghklmnprstvwz" for rest in ("a", "e", "i", "o", "u", "an", "el", "or")
]


class Desk:
    """One shop. Tool calls are serialized and may come from several threads, as in LangGraph."""

    def __init__(self, connection: sqlite3.Connection):
        self.turn = threading.Lock()
        self.db = connection
        self.db.row_factory = sqlite3.Row

    @classmethod
    def create(cls, seed: int, lexicon: Lexicon = USUAL) -> Desk:
        """Generate a shop from a seed."""
        desk = cls(sqlite3.connect(":memory:", check_same_thread=False))
        desk.db.executescript(SCHEMA)
        _fill(desk.db, random.Random(f"desk-{seed}"), lexicon)
        return desk

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run a tool and return its result as JSON text."""
        if name not in TOOLS:
            return _json({"error": f"unknown tool {name}"})
        try:
            with self.turn:
                return _json(TOOLS[name](self, **arguments))
        except (TypeError, ValueError, ArithmeticError, SyntaxError, sqlite3.Error) as error:
            return _json({"error": str(error)})

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Rows of a query, as dicts."""
        return [dict(row) for row in self.db.execute(sql, values)]


def lookup_order(desk: Desk, order_id: int) -> dict[str, Any]:
    """An order with its customer, items and shipment."""
    orders = desk.rows("SELECT * FROM orders WHERE id = ?", order_id)
    if not orders:
        raise ValueError(f"no order {order_id}")
    order = orders[0]
    customer = desk.rows("SELECT * FROM customers WHERE id = ?", order["customer_id"])[0]
    items = desk.rows(
        "SELECT i.sku, p.name, i.quantity, i.price FROM items i JOIN products p ON p.sku = i.sku "
        "WHERE i.order_id = ? ORDER BY i.sku",
        order_id,
    )
    shipments = desk.rows("SELECT carrier, tracking, status, eta FROM shipments WHERE order_id = ?", order_id)
    return {
        "order_id": order["id"],
        "status": order["status"],
        "placed": order["placed"],
        "customer": customer,
        "items": items,
        "total": order["total"],
        "shipment": shipments[0] if shipments else None,
    }


def search_customers(desk: Desk, query: str) -> dict[str, Any]:
    """Up to five customers by part of name or email, with their orders."""
    pattern = f"%{query}%"
    found = desk.rows("SELECT * FROM customers WHERE name LIKE ? OR email LIKE ? ORDER BY id LIMIT 5", pattern, pattern)
    for customer in found:
        customer["orders"] = desk.rows(
            "SELECT id, status, placed, total FROM orders WHERE customer_id = ? ORDER BY id", customer["id"]
        )
    return {"count": len(found), "customers": found}


def run_sql(desk: Desk, sql: str) -> dict[str, Any]:
    """Read-only, enforced by SQLite's authorizer."""
    desk.db.set_authorizer(_only_reading)
    try:
        rows = [dict(row) for row in desk.db.execute(sql).fetchmany(20)]
    finally:
        desk.db.set_authorizer(None)
    return {"count": len(rows), "rows": rows}


def calculate(desk: Desk, expression: str) -> dict[str, Any]:
    """The rounded result of an arithmetic expression."""
    return {"expression": expression, "result": round(_evaluate(ast.parse(expression, mode="eval").body), MONEY)}


def check_stock(desk: Desk, sku: str) -> dict[str, Any]:
    """A row of the products table."""
    found = desk.rows("SELECT * FROM products WHERE sku = ?", sku)
    if not found:
        raise ValueError(f"no product {sku}")
    return found[0]


def update_order(desk: Desk, order_id: int, status: str) -> dict[str, Any]:
    """Set an order's status."""
    if status not in STATUSES:
        raise ValueError(f"unknown status {status}; use one of {', '.join(STATUSES)}")
    before = lookup_order(desk, order_id)["status"]
    with desk.db:
        desk.db.execute("UPDATE orders SET status = ? WHERE id = ?", (status, order_id))
    return {"order_id": order_id, "status": status, "previous_status": before, "updated": True}


TOOLS: dict[str, Callable[..., dict[str, Any]]] = {
    "lookup_order": lookup_order,
    "search_customers": search_customers,
    "run_sql": run_sql,
    "calculate": calculate,
    "check_stock": check_stock,
    "update_order": update_order,
}


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOL_SCHEMAS: list[dict[str, Any]] = [
    _tool("lookup_order", "One order with customer, items and shipment.", order_id="integer"),
    _tool("search_customers", "Customers by part of name or email, with their orders.", query="string"),
    _tool("run_sql", "Read-only SQL on customers, products, orders, items, shipments.", sql="string"),
    _tool("calculate", "Evaluate an arithmetic expression.", expression="string"),
    _tool("check_stock", "Price, stock and warehouse of a product.", sku="string"),
    _tool("update_order", "Set the status of an order.", order_id="integer", status="string"),
]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _only_reading(action: int, *_: Any) -> int:
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise ValueError("only numbers and + - * / are understood")


def _fill(db: sqlite3.Connection, rng: random.Random, lexicon: Lexicon) -> None:
    """A shop of 12 customers, 8 products and 30 orders."""
    skus = [f"{name[:2].upper()}-{rng.randint(1000, 9999)}" for name in lexicon.products]
    prices = [round(rng.uniform(5, 200), MONEY) for _ in lexicon.products]
    for sku, name, price in zip(skus, lexicon.products, prices, strict=True):
        row = (sku, name, price, rng.randint(0, 90), rng.choice(lexicon.cities))
        db.execute("INSERT INTO products VALUES (?, ?, ?, ?, ?)", row)
    names = rng.sample([f"{first} {last}" for first in lexicon.first_names for last in lexicon.last_names], 12)
    for name in names:
        email = name.lower().replace(" ", ".") + "@example.com"
        tier = rng.choice(["basic", "silver", "gold"])
        row = (rng.randint(100, 999) * 100 + names.index(name), name, email, rng.choice(lexicon.cities), tier)
        db.execute("INSERT INTO customers VALUES (?, ?, ?, ?, ?)", row)
    customers = [row[0] for row in db.execute("SELECT id FROM customers ORDER BY id")]
    for order_id in sorted(rng.sample(range(1000, 9999), 30)):
        _fill_order(db, rng, lexicon, order_id, rng.choice(customers), dict(zip(skus, prices, strict=True)))
    db.commit()


def _fill_order(
    db: sqlite3.Connection, rng: random.Random, lexicon: Lexicon, order_id: int, customer: int, prices: dict[str, float]
) -> None:
    status = rng.choice(STATUSES)
    total = 0.0
    for sku in rng.sample(sorted(prices), rng.randint(1, 3)):
        quantity = rng.randint(1, 5)
        total += quantity * prices[sku]
        db.execute("INSERT INTO items VALUES (?, ?, ?, ?)", (order_id, sku, quantity, prices[sku]))
    placed = f"2026-{rng.randint(1, 9):02}-{rng.randint(1, 28):02}"
    row = (order_id, customer, status, placed, round(total, MONEY))
    db.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", row)
    if status in ("shipped", "delivered"):
        tracking = f"{rng.choice('ABCDEF')}{rng.choice('GHJKLM')}{rng.randint(10**6, 10**7 - 1)}"
        shipment = "in transit" if status == "shipped" else "delivered"
        eta = f"2026-10-{rng.randint(1, 28):02}"
        row = (order_id, rng.choice(lexicon.carriers), tracking, shipment, eta)
        db.execute("INSERT INTO shipments VALUES (?, ?, ?, ?, ?)", row)
