"""The checker finds each kind of lie: run by `crates/cli/tests/ledger.rs`, or `python3 -m unittest`."""

import copy
import unittest

import check


def tape(id="A", **more):
    usage = {
        "prompt_tokens": 5, "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1}, "completion_tokens_details": {"reasoning_tokens": 0},
    }
    return {
        "id": id, "status": 200, "prompts": 1, "n": 1, "max_tokens": 40, "tokens": 7, "ended": True, "usage": usage,
        "error": None, "left": False, "finish": ["stop"], **more,
    }


def row(id="A", **more):
    return {
        "id": id, "writer": "w", "epoch": 1, "state": "closed", "finish": "stop", "status": 200, "prompt_tokens": 5,
        "cached_tokens": 1, "completion_tokens": 7, "reasoning_tokens": 0, "wasted_tokens": 2, "digest": f"d{id}",
        **more,
    }


def links(rows):
    out = []
    for r in rows:
        for kind, digest in (("open", "o"), ("recover" if r["finish"] == "crashed" else "close", r["digest"])):
            seq = len(out) + 1
            out.append({"writer": "w", "epoch": 1, "seq": seq, "kind": kind, "id": r["id"], "digest": digest})
    return out


class Checker(unittest.TestCase):
    def problems(self, tapes, rows, chain=None, **more):
        chain = links(rows) if chain is None else chain
        writers = [{"writer": "w", "epoch": 1, "seq": len(chain)}]
        return check.check(tapes, rows, chain, writers, **more)

    def fails(self, word, tapes, rows, chain=None):
        problems = self.problems(tapes, rows, chain)
        self.assertTrue(any(word in problem for problem in problems), problems)

    def test_what_agrees_is_no_problem(self):
        crashed = {"finish": "crashed", "completion_tokens": 3}
        cut = tape("B", ended=False, usage=None, tokens=19, finish=[])
        nameless = tape(None, status=None, tokens=0, ended=False, usage=None)
        refused = tape("D", status=400, ended=False, usage=None, tokens=0)
        rows = [row(), row("B", **crashed), row("C", finish="abort")]
        self.assertEqual(self.problems([tape(), cut, nameless, refused], rows), [])

    def test_one_token_between_tape_and_row(self):
        for wrong in (6, 8):
            self.fails("I2", [tape()], [row(completion_tokens=wrong)])
            self.fails("I2", [tape(usage=None)], [row(completion_tokens=wrong)])
            self.fails("I2", [tape(tokens=wrong)], [row()])

    def test_one_token_in_what_was_told(self):
        for path in check.USAGE.values():
            wrong = tape()
            wrong["usage"] = copy.deepcopy(wrong["usage"])
            at = wrong["usage"]
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] += 1
            self.fails("I2", [wrong], [row()])

    def test_a_row_that_is_missing_doubled_or_strange(self):
        self.fails("I1: no row", [tape()], [])
        self.fails("I1: A has 2 rows", [tape()], [row(), row()])
        self.fails("of no tape", [tape()], [row(), row("B")])
        self.fails("I5", [tape(status=429, ended=False, usage=None)], [row()])

    def test_a_row_that_is_left_open(self):
        open_row = row(state="open", finish="none")
        left = tape(ended=False, usage=None, left=True)
        self.fails("left open", [left], [open_row])
        self.assertEqual(self.problems([left], [open_row], links([row()])[:1], running=1), [])

    def test_more_has_left_than_a_row_tells(self):
        cut = tape(ended=False, usage=None, tokens=20, finish=[])
        self.fails("I4", [cut], [row(finish="crashed", completion_tokens=3)])
        self.fails("I3", [cut], [row(finish="abort", completion_tokens=19)])
        self.fails("I3", [cut], [row(finish="abort", completion_tokens=41)])
        self.fails("I2", [tape()], [row(finish="crashed")])

    def test_an_answer_and_its_row_end_otherwise(self):
        self.fails("I2", [tape()], [row(finish="length")])
        self.fails("I2", [tape()], [row(status=503)])
        self.fails("I5", [tape(ended=False, error="x")], [row()])
        self.fails("I5", [tape(status=503, ended=False, usage=None)], [row()])

    def test_links_with_gaps_or_without_a_row(self):
        good = links([row()])
        self.fails("links of w/1", [tape()], [row()], [{**good[0], "seq": 2}, good[1]])
        self.fails("not opened", [tape()], [row()], [{**good[1], "seq": 1}])
        self.fails("no link attests", [tape()], [row()], [good[0], {**good[1], "digest": "other"}])
        self.fails("closed twice", [tape()], [row()], good + [{**good[1], "seq": 3}])
        self.fails("without a row", [tape(None, status=None)], [], good)
        self.assertTrue(check.check([], [], good[:1], []), "links of a writer that is not known")

    def test_margins_are_of_both_signs(self):
        tapes = [tape(tokens=17), tape("B", tokens=2), tape("C", tokens=99, status=503), tape("D", tokens=99)]
        self.assertEqual(check.margins(tapes, [row(), row("B"), row("C")]), {"lacks": 10, "beyond": 5})

    def test_counters_against_sums(self):
        page = "# HELP x\n" + "\n".join(f"{name} {row()[column]}" for name, column in check.COUNTERS.items())
        metrics = check.read_metrics(page + '\nother{a="b"} 1\n')
        self.assertEqual(check.check_metrics(metrics, [row()]), [])
        for counter in check.COUNTERS:
            wrong = {**metrics, counter: metrics[counter] + 1}
            self.assertEqual(len(check.check_metrics(wrong, [row()])), 1)
            del wrong[counter]
            self.assertEqual(len(check.check_metrics(wrong, [row()])), 1)

    def test_a_digest_shows_any_change(self):
        rows = [row(), row("B", epoch=2)]
        before = check.digests(rows)
        self.assertEqual(before, check.digests(rows[::-1]))
        after = check.digests([rows[0], {**rows[1], "wasted_tokens": 3}])
        self.assertEqual([name for name in before if before[name] != after[name]], ["w/2"])


if __name__ == "__main__":
    unittest.main()
