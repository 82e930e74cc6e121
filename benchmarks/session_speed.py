"""A session beside fresh asks and beside the bare loop: a decoder of 1B, 320 tokens a picture, on the CPU.

    python -m benchmarks.session_speed

Two things are measured with the same bundle (random weights; vision tower CLIP ViT-L/14-336, five tiles):

* how much sooner ten questions about one frame are answered by one session than by ten ``EdgeModel.ask``, which encode
  and read the picture each time, and by ten asks about a picture that was encoded once; the answers must be the same
* what a session adds to a token of a long answer, over a loop that does nothing but read an embedding and take the
  likeliest token: detokenizing, stop strings, bookkeeping. In turn, in one process, the same number of tokens (not
  always the same ones: a prompt read in two parts sums in another order, and random weights have close calls)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import bundles
from benchmarks.report import REPORTS, Bar, Cell, Report, Samples
from vz_edge import EdgeModel
from vz_edge.device.decoder import Context, Decoder
from vz_edge.device.prompt import messages_of
from vz_edge.device.reply import Reply
from vz_edge.profiling.environment import busy_percent

QUESTIONS = (
    "Is the door open?",
    "Is anyone there?",
    "What is on the table?",
    "How many chairs are there?",
    "Is the light on?",
    "What colour is the wall?",
    "Is the way free?",
    "What is to the left of the table?",
    "What does the sign say?",
    "Is it day or night?",
)
PICTURE_SIZE = (800, 1000, 3)  # height, width, channels
COLUMNS = ("way", "ten answers", "tokens read", "a token of a long answer", "of it outside of the decoder")
SHORT_ANSWER_TOKENS, LONG_ANSWER_TOKENS = 4, 64
LEAST_SPEED_UP, OVERHEAD_LIMIT_PERCENT = 5.0, 2.0


def ten_questions(model: EdgeModel, picture: np.ndarray) -> dict[str, tuple[float, list[Reply]]]:
    """Seconds and replies of each way to ask all questions about one picture."""

    def fresh() -> list[Reply]:
        return [model.ask(picture, question, max_new_tokens=SHORT_ANSWER_TOKENS) for question in QUESTIONS]

    def encoded() -> list[Reply]:
        look = model.encode(picture)
        return [model.ask(look, question, max_new_tokens=SHORT_ANSWER_TOKENS) for question in QUESTIONS]

    def session() -> list[Reply]:
        robot = model.session()
        robot.look(picture)
        return [robot.ask(question, max_new_tokens=SHORT_ANSWER_TOKENS) for question in QUESTIONS]

    ways: dict[str, Callable[[], list[Reply]]] = {
        "ten fresh asks": fresh,
        "encoded once, ten asks": encoded,
        "one session": session,
    }
    measured = {}
    for name, ask in ways.items():
        started = time.perf_counter()
        replies = ask()
        measured[name] = (time.perf_counter() - started, replies)
    return measured


class TimedDecoder:
    """A decoder that adds up the seconds spent in it, and knows those of the first call, which is a prefill's."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.first_sec, self.sec = 0.0, 0.0

    def restart(self) -> None:
        """Count anew."""
        self.first_sec, self.sec = 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def start(self, capacity: int) -> TimedContext:
        return TimedContext(self, self._decoder.start(capacity))


class TimedContext:
    """One of its contexts."""

    def __init__(self, decoder: TimedDecoder, context: Context) -> None:
        self._decoder, self._context = decoder, context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def append(self, embeds: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        logits = self._context.append(embeds)
        sec = time.perf_counter() - started
        self._decoder.first_sec = self._decoder.first_sec or sec
        self._decoder.sec += sec
        return logits


class LongAnswer(NamedTuple):
    """Seconds a token: all of the call but its prefill, and what of it was not the decoder's."""

    total_sec: float
    outside_sec: float


def long_answers(model: EdgeModel, picture: np.ndarray, rounds: int) -> dict[str, list[LongAnswer]]:
    """Long answers by a session and by the bare loop, in turn."""
    look = model.encode(picture)
    model.decoder = timed = TimedDecoder(model.decoder)
    robot = model.session()
    robot.look(look)
    ids = model.chat.ids(messages_of(QUESTIONS[0], 1))
    prompt = model.embedding.place(ids, model.chat.image_token_id, [look.features])
    context = model.decoder.start(robot.context_length)

    def session() -> None:
        reply = robot.ask(QUESTIONS[0], max_new_tokens=LONG_ANSWER_TOKENS)
        if reply.answer_tokens < LONG_ANSWER_TOKENS:
            raise SystemExit(f"the answer ended after {reply.answer_tokens} tokens; expected {LONG_ANSWER_TOKENS}")

    def bare_loop() -> None:
        context.rewind(0)
        token_id = int(context.append(prompt).argmax())
        for _ in range(LONG_ANSWER_TOKENS - 1):
            token_id = int(context.append(model.embedding.rows([token_id])).argmax())

    answers: dict[str, list[LongAnswer]] = {"one session": [], "bare loop": []}
    for number in range(rounds + 1):
        for name, write in (("one session", session), ("bare loop", bare_loop)):
            timed.restart()
            started = time.perf_counter()
            write()
            total_sec = time.perf_counter() - started
            if number:  # the first round warms up
                tokens = LONG_ANSWER_TOKENS - 1
                outside_sec = (total_sec - timed.sec) / tokens
                answers[name].append(LongAnswer((total_sec - timed.first_sec) / tokens, outside_sec))
    return answers


def report(shape: str, model: EdgeModel, rounds: int, token_rounds: int, busy: float) -> Report:
    """Measure and tabulate; the speed-up is the median of the rounds' own ratios."""
    picture = np.random.default_rng(0).integers(0, 256, PICTURE_SIZE, dtype=np.uint8)
    taken = [ten_questions(model, picture) for _ in range(rounds + 1)][1:]  # the first round warms up
    for ways in taken:
        answers = {name: [reply.text for reply in replies] for name, (_, replies) in ways.items()}
        if len({tuple(texts) for texts in answers.values()}) > 1:
            raise SystemExit(f"the answers differ: {answers}")
    long = long_answers(model, picture, token_rounds)

    speed_ups = [ways["ten fresh asks"][0] / ways["one session"][0] for ways in taken]
    outside = {name: statistics.median(answer.outside_sec for answer in answers) for name, answers in long.items()}
    added_sec = outside["one session"] - outside["bare loop"]
    overhead = added_sec / statistics.median(answer.total_sec for answer in long["bare loop"])
    rows: list[dict[str, Cell]] = [
        {
            **dict.fromkeys(COLUMNS, "–"),
            "way": name,
            "ten answers": Samples(tuple(ways[name][0] for ways in taken), "s"),
            "tokens read": str(sum(_tokens_read(reply) for reply in taken[0][name][1])),
        }
        for name in taken[0]
    ]
    rows.append({**dict.fromkeys(COLUMNS, "–"), "way": "bare loop"})
    for row in rows[-2:]:
        given = long[str(row["way"])]
        row[COLUMNS[-2]] = Samples(tuple(1000 * answer.total_sec for answer in given), "ms")
        row[COLUMNS[-1]] = Samples(tuple(1000 * answer.outside_sec for answer in given), "ms")
    return Report(
        name="session_speed",
        title=f"A session of a {shape}: ten questions about one frame, and what it adds to a token",
        busy_percent=busy,
        notes=[
            f"Greedy, random weights, answers of {SHORT_ANSWER_TOKENS} tokens, the same from all ways; "
            f"{rounds} interleaved rounds after one that warms up.",
            "Tokens read: of text and pictures, by the replies; those that the session's look has read are not in it.",
            f"A token of an answer of {LONG_ANSWER_TOKENS}: all of the call but its prefill, {token_rounds} times in "
            "turn with the bare loop. The decoder's own time swings by a tenth, whoever calls it, so what a session "
            "adds is taken outside of it: the question's template, tokenizing and bookkeeping are in it.",
        ],
        rows=rows,
        bars=[
            Bar("ten questions, fresh asks / session", statistics.median(speed_ups), ">=", LEAST_SPEED_UP, "x"),
            Bar("what a session adds to a token of the bare loop", 100 * overhead, "<=", OVERHEAD_LIMIT_PERCENT, "%"),
        ]
        if shape == "1b"
        else (),
        settings={"rounds": rounds, "token_rounds": token_rounds, "speed_ups": str(speed_ups)},
    )


def _tokens_read(reply: Reply) -> int:
    return reply.prompt_tokens + reply.image_tokens - reply.cached_tokens


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", help="1b or tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="of ten questions, each way")
    parser.add_argument("--token-rounds", type=int, default=15, help="of a long answer, each way")
    parser.add_argument("--work", type=Path, default=bundles.WORK)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    busy = busy_percent()
    model = EdgeModel.load(bundles.bundle(arguments.shape, "cpu", arguments.work), threads=arguments.threads)
    report(arguments.shape, model, arguments.rounds, arguments.token_rounds, busy).write(arguments.reports)


if __name__ == "__main__":
    main()
