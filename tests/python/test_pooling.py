"""Embeddings with the official client, rerank and score with plain HTTP in the gateways' shapes, against running
servers: MIRAI_EMBED_URL and MIRAI_SCORE_URL name them, MIRAI_KEY is their key. Without them these tests are skipped.

Run by the suite of `crates/server`.
"""

import base64
import math
import os
import struct
import unittest

import httpx2 as httpx  # comes with openai
import openai

EMBED = os.environ.get("MIRAI_EMBED_URL")
SCORE = os.environ.get("MIRAI_SCORE_URL")
KEY = os.environ.get("MIRAI_KEY", "none")


@unittest.skipUnless(EMBED, "MIRAI_EMBED_URL names no server")
class Embeddings(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = openai.OpenAI(base_url=EMBED + "/v1", api_key=KEY, max_retries=0, timeout=60)
        cls.model = cls.client.models.list().data[0].id

    @classmethod
    def tearDownClass(cls):
        cls.client.close()

    def embed(self, value, **fields):
        return self.client.embeddings.create(model=self.model, input=value, **fields)

    def test_text(self):
        answer = self.embed("Bonjour")
        self.assertEqual(answer.object, "list")
        self.assertEqual(answer.model, self.model)
        self.assertEqual((answer.data[0].object, answer.data[0].index), ("embedding", 0))
        self.assertGreater(answer.usage.prompt_tokens, 0)
        self.assertEqual(answer.usage.prompt_tokens, answer.usage.total_tokens)
        self.assertAlmostEqual(math.hypot(*answer.data[0].embedding), 1, places=5)

    def test_base64_is_float(self):
        # The client asks for base64 by itself unless told otherwise, and decodes it.
        silent, floats = self.embed("Bonjour"), self.embed("Bonjour", encoding_format="float")
        coded = self.embed("Bonjour", encoding_format="base64").data[0].embedding
        if isinstance(coded, str):
            raw = base64.b64decode(coded, validate=True)
            coded = struct.unpack(f"<{len(raw) // 4}f", raw)
        for values in (silent.data[0].embedding, coded):
            self.assertEqual(len(values), len(floats.data[0].embedding))
            for one, other in zip(values, floats.data[0].embedding):
                self.assertAlmostEqual(one, other, places=6)

    def test_lists_and_token_ids(self):
        both = self.embed(["Bonjour", "le monde"])
        self.assertEqual([entry.index for entry in both.data], [0, 1])
        alone = self.embed("le monde")
        self.assertEqual(both.data[1].embedding, alone.data[0].embedding)
        ids = self.embed([[5, 6, 7], [8]])
        self.assertEqual(ids.usage.prompt_tokens, 4)
        self.assertEqual(ids.data[0].embedding, self.embed([5, 6, 7]).data[0].embedding)

    def test_dimensions(self):
        whole = self.embed("Bonjour").data[0].embedding
        part = self.embed("Bonjour", dimensions=4).data[0].embedding
        length = math.hypot(*whole[:4])
        for one, other in zip(part, whole[:4], strict=True):
            self.assertAlmostEqual(one, other / length, places=5)

    def test_typed_errors(self):
        for fields, param in [
            (dict(input=[]), "input"),
            (dict(input=[[10**9]]), "input[0]"),
            (dict(input="a", dimensions=10**6), "dimensions"),
        ]:
            with self.subTest(fields=fields), self.assertRaises(openai.BadRequestError) as caught:
                self.client.embeddings.create(model=self.model, **fields)
            self.assertEqual(caught.exception.param, param)
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": "Bonjour"}]
            )
        self.assertEqual(caught.exception.code, "wrong_task")

    def test_probe_of_a_gateway(self):
        # OpenGateLLM finds the vector's size like this.
        reply = httpx.post(
            EMBED + "/v1/embeddings",
            json={"model": self.model, "input": "hello world"},
            headers={"Authorization": f"Bearer {KEY}"},
        )
        self.assertEqual(reply.headers["content-type"], "application/json")
        self.assertGreater(len(reply.json()["data"][0]["embedding"]), 0)


@unittest.skipUnless(SCORE, "MIRAI_SCORE_URL names no server")
class Scores(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        headers = {"Authorization": f"Bearer {KEY}"}
        cls.client = httpx.Client(base_url=SCORE, headers=headers, timeout=60)
        cls.model = cls.client.get("/v1/models").json()["data"][0]["id"]

    @classmethod
    def tearDownClass(cls):
        cls.client.close()

    def post(self, path, **body):
        reply = self.client.post(path, json={"model": self.model, **body})
        self.assertEqual(reply.status_code, 200, reply.text)
        self.assertEqual(reply.headers["content-type"], "application/json")
        return reply.json()

    def test_rerank(self):
        documents = ["Paris est en France.", "Berlin est en Allemagne.", {"text": "Lyon aussi."}]
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            answer = self.post(path, query="Où est Paris ?", documents=documents)
            scores = [result["relevance_score"] for result in answer["results"]]
            self.assertEqual(scores, sorted(scores, reverse=True))
            self.assertTrue(all(0 <= score <= 1 for score in scores))
            self.assertEqual(sorted(result["index"] for result in answer["results"]), [0, 1, 2])
            for result in answer["results"]:
                document = documents[result["index"]]
                text = document if isinstance(document, str) else document["text"]
                self.assertEqual(result["document"], {"text": text})
            self.assertEqual(answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"])
            best = self.post(
                path, query="Où est Paris ?", documents=documents, top_n=1, return_documents=False
            )
            self.assertEqual(best["results"][0]["index"], answer["results"][0]["index"])
            self.assertEqual(len(best["results"]), 1)
            self.assertNotIn("document", best["results"][0])

    def test_score(self):
        for one, other in [("text_1", "text_2"), ("queries", "documents"), ("queries", "items")]:
            each = self.post("/v1/score", **{one: "a", other: ["b", "c"]})
            self.assertEqual([entry["index"] for entry in each["data"]], [0, 1])
            pairs = self.post("/score", **{one: ["a", "a"], other: ["b", "c"]})
            self.assertEqual(each["data"], pairs["data"])

    def test_errors(self):
        for path, body, param in [
            ("/v2/rerank", dict(query="a", documents=[]), "documents"),
            ("/v2/rerank", dict(documents=["a"]), "query"),
            ("/v1/score", dict(text_1=["a", "b"], text_2=["a"]), "text_1"),
            ("/v1/embeddings", dict(input="a"), "model"),
        ]:
            reply = self.client.post(path, json=body)
            self.assertEqual((reply.status_code, reply.json()["error"]["param"]), (400, param))
        self.assertEqual(httpx.post(SCORE + "/v2/rerank", json={}).status_code, 401 if KEY != "none" else 400)


if __name__ == "__main__":
    unittest.main()
