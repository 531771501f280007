"""The official OpenAI client against a running server: MIRAI_URL names it, MIRAI_KEY is its key.

Run by `crates/cli/tests/openai_client.rs`; by hand: `MIRAI_URL=http://127.0.0.1:8000 python -m unittest`.
"""

import json
import os
import unittest
import urllib.request

import openai

URL = os.environ["MIRAI_URL"]
KEY = os.environ.get("MIRAI_KEY", "none")
QUESTION = [{"role": "user", "content": "Bonjour"}]


class OpenAIClient(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = openai.OpenAI(base_url=URL + "/v1", api_key=KEY, max_retries=0, timeout=120)
        cls.model = cls.client.models.list().data[0].id

    @classmethod
    def tearDownClass(cls):
        cls.client.close()

    def chat(self, **fields):
        fields = {"model": self.model, "messages": QUESTION, "max_tokens": 16, "temperature": 0, **fields}
        return self.client.chat.completions.create(**fields)

    def test_models(self):
        models = self.client.models.list().data
        self.assertEqual(models[0].object, "model")
        self.assertGreater(models[0].created, 0)
        self.assertTrue(models[0].owned_by)
        self.assertGreater(models[0].max_model_len, 0)
        self.assertEqual(self.client.models.retrieve(self.model).id, self.model)
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("nothing")

    def test_chat(self):
        answer = self.chat()
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual(answer.model, self.model)
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertTrue(answer.choices[0].message.content)
        # The demo model marks no reasoning; clients read both names without asking whether they are there.
        self.assertIsNone(answer.choices[0].message.reasoning)
        self.assertIsNone(answer.choices[0].message.reasoning_content)
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        usage = answer.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        self.assertLessEqual(usage.completion_tokens, 16)
        self.assertGreaterEqual(usage.prompt_tokens_details.cached_tokens, 0)
        self.assertEqual(usage.completion_tokens_details.reasoning_tokens, 0)

    def test_stream_equals_the_whole_answer(self):
        whole = self.chat()
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        self.assertEqual(text, whole.choices[0].message.content)
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        self.assertEqual(reasons, [whole.choices[0].finish_reason])
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.prompt_tokens, whole.usage.prompt_tokens)
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
        self.assertTrue(all(c.usage is None for c in chunks[:-1]))
        self.assertEqual(len({c.id for c in chunks}), 1)

    def test_three_choices(self):
        free = dict(
            messages=[{"role": "user", "content": "La nuit tombait sur la ville"}],
            n=3,
            temperature=1.5,
            seed=7,
            max_tokens=24,
        )
        answer = self.chat(**free)
        self.assertEqual([c.index for c in answer.choices], [0, 1, 2])
        self.assertGreater(len({c.message.content for c in answer.choices}), 1)
        again = self.chat(**free)
        self.assertEqual(
            [c.message.content for c in answer.choices], [c.message.content for c in again.choices]
        )

    def test_three_streamed_choices(self):
        whole = self.chat(n=3, temperature=1.0, seed=7)
        texts = ["", "", ""]
        for chunk in self.chat(n=3, temperature=1.0, seed=7, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        self.assertEqual(texts, [c.message.content for c in whole.choices])

    def test_logprobs(self):
        answer = self.chat(logprobs=True, top_logprobs=3)
        content = answer.choices[0].logprobs.content
        self.assertGreater(len(content), 0)
        for entry in content:
            self.assertLessEqual(entry.logprob, 0)
            self.assertEqual(len(entry.top_logprobs), 3)
            self.assertGreaterEqual(entry.top_logprobs[0].logprob, entry.top_logprobs[1].logprob)
            # Greedy: what was drawn is what is most likely.
            self.assertAlmostEqual(entry.logprob, entry.top_logprobs[0].logprob, places=5)
        raw = b"".join(bytes(e.bytes) for e in content)
        self.assertTrue(raw.decode("utf-8", "replace").startswith(answer.choices[0].message.content))

    def test_stop(self):
        whole = self.chat(max_tokens=12).choices[0].message.content
        stop = whole[4:7]
        answer = self.chat(max_tokens=12, stop=[stop])
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertEqual(answer.choices[0].message.content, whole[: whole.index(stop)])

    def test_seed(self):
        # Free text: what the model knows by heart it says at any temperature.
        free = dict(prompt="La nuit tombait sur la ville", temperature=1.2, max_tokens=24)
        texts = [self.complete(**free, seed=s).choices[0].text for s in (1, 1, 2)]
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])

    def complete(self, prompt, **fields):
        fields = {"model": self.model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
        return self.client.completions.create(**fields)

    def test_completions_with_text_and_with_token_ids(self):
        text = "Il était une fois"
        request = urllib.request.Request(
            URL + "/tokenize",
            json.dumps({"model": self.model, "prompt": text}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )
        with urllib.request.urlopen(request) as reply:
            self.assertEqual(reply.headers["Content-Type"], "application/json")
            ids = json.load(reply)["tokens"]
        by_text, by_ids = self.complete(text), self.complete(ids)
        self.assertEqual(by_text.choices[0].text, by_ids.choices[0].text)
        self.assertEqual(by_ids.usage.prompt_tokens, len(ids))
        both = self.complete([ids, ids])
        self.assertEqual([c.index for c in both.choices], [0, 1])
        self.assertEqual(both.choices[0].text, by_ids.choices[0].text)
        echo = self.complete(text, echo=True, logprobs=1)
        self.assertTrue(echo.choices[0].text.startswith(text))
        self.assertEqual(len(echo.choices[0].logprobs.tokens), echo.usage.total_tokens)
        extra = self.complete(ids, extra_body={"return_token_ids": True, "ignore_eos": True})
        self.assertEqual(len(extra.choices[0].token_ids), 8)

    def test_completions_stream(self):
        whole = self.complete("Il était une fois")
        text = "".join(c.choices[0].text for c in self.complete("Il était une fois", stream=True))
        self.assertEqual(text, whole.choices[0].text)

    def test_typed_errors(self):
        bad = [
            (dict(temperature=-1), openai.BadRequestError, "temperature"),
            (dict(max_tokens=0), openai.BadRequestError, "max_tokens"),
            (dict(max_tokens=10_000_000), openai.BadRequestError, "max_tokens"),
            (dict(n=0), openai.BadRequestError, "n"),
            (dict(top_logprobs=3, logprobs=False), openai.BadRequestError, "top_logprobs"),
            (dict(messages=[]), openai.BadRequestError, "messages"),
            (dict(model="nothing"), openai.NotFoundError, "model"),
            (
                dict(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
                openai.BadRequestError,
                "tools",
            ),
            (dict(response_format={"type": "json_object"}), openai.BadRequestError, "response_format"),
        ]
        for fields, kind, param in bad:
            with self.subTest(fields=fields), self.assertRaises(kind) as caught:
                self.chat(**fields)
            self.assertEqual(caught.exception.param, param)
            self.assertTrue(caught.exception.body["message"])
        with openai.OpenAI(base_url=URL + "/v1", api_key="wrong", max_retries=0) as stranger:
            if KEY != "none":
                with self.assertRaises(openai.AuthenticationError):
                    stranger.models.list()

    def test_base_url_without_version(self):
        with openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
            answer = client.chat.completions.create(
                model=self.model, messages=QUESTION, max_tokens=4, temperature=0
            )
            self.assertEqual(answer.usage.completion_tokens, 4)

    def test_system_and_developer_messages(self):
        messages = [
            {"role": "system", "content": "Réponds en français."},
            {"role": "developer", "content": [{"type": "text", "text": "Sois bref."}]},
            *QUESTION,
        ]
        self.assertTrue(self.chat(messages=messages).choices[0].message.content)


if __name__ == "__main__":
    unittest.main()
