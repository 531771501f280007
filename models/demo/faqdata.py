"""The FAQ and its variations: loading, the disjointness of training and held-out questions, seeded augmentation.

Owns what a training question may look like. Never lets a held-out paraphrase through: `Augmenter.vary` drops any
variation whose normal form equals that of a held-out question.
"""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Generic wordings only; nothing here names a topic of the FAQ.
OPENINGS = {
    "fr": ["S'il te plaît, ", "S'il vous plaît, ", "Dis-moi, ", "Bonjour, ", "Bonjour ! ", "J'ai une question : ",
           "Je voudrais savoir : ", "Pardon, ", "Question : ", "Dites-moi, ", "Alors, ", "Au fait, ", "Et "],
    "en": ["Please, ", "Hi, ", "Hello, ", "Tell me, ", "I have a question: ", "I would like to know: ", "Sorry, ",
           "Question: ", "So, ", "By the way, ", "And ", "Quick question: ", "Please tell me: "],
}
CLOSINGS = {
    "fr": [" s'il te plaît", " s'il vous plaît", ", merci", " svp", " avec mirai", " sur ce serveur"],
    "en": [" please", ", thanks", ", thank you", " with mirai", " on this server", " here"],
}
# (pattern at the start of a question, replacements); \1 is what follows.
FORMS = {
    "fr": [
        (r"^Comment ((?:\w+er|\w+ir|\w+re|faire|avoir|voir|savoir)\b.*?) ?\?$",
         [r"Comment puis-je \1 ?", r"Comment faire pour \1 ?", r"Comment peut-on \1 ?", r"Je veux \1",
          r"Je voudrais \1", r"J'aimerais \1", r"Peut-on \1 ?", r"Est-il possible de \1 ?", r"Je cherche à \1",
          r"Explique-moi comment \1", r"Quelle est la façon de \1 ?", r"Puis-je \1 ?", r"Que faire pour \1 ?"]),
        (r"^À quoi sert (.*?) ?\?$",
         [r"Que fait \1 ?", r"C'est quoi \1 ?", r"Explique-moi \1", r"Que veut dire \1 ?", r"Quel est le rôle de \1 ?",
          r"Quand utiliser \1 ?", r"\1, à quoi ça sert ?", r"Qu'est-ce que \1 ?", r"\1", r"Parle-moi de \1"]),
        (r"^Qu'est-ce que (.*?) ?\?$",
         [r"C'est quoi \1 ?", r"Explique-moi \1", r"Que veut dire \1 ?", r"Définis \1", r"\1, c'est quoi ?", r"Parle-moi de \1"]),
        (r"^Que signifie (.*?) ?\?$",
         [r"Que veut dire \1 ?", r"\1, ça veut dire quoi ?", r"Quel est le sens de \1 ?", r"Explique \1", r"C'est quoi \1 ?"]),
        (r"^Que veut dire (.*?) ?\?$",
         [r"Que signifie \1 ?", r"\1, ça veut dire quoi ?", r"Quel est le sens de \1 ?", r"Explique \1", r"Pourquoi \1 ?"]),
        (r"^Quelle option (.*?) ?\?$",
         [r"Quel paramètre \1 ?", r"Quel réglage \1 ?", r"Y a-t-il une option qui \1 ?", r"Quelle est l'option qui \1 ?"]),
        (r"^Quelle route (.*?) ?\?$",
         [r"Quel endpoint \1 ?", r"Quelle URL \1 ?", r"Quel chemin \1 ?", r"Quelle adresse \1 ?"]),
        (r"^Où (?:est|sont) (.*?) ?\?$", [r"Où trouver \1 ?", r"Où se trouve \1 ?", r"Je cherche \1", r"Où voir \1 ?"]),
        (r"^Que se passe-t-il (.*?) ?\?$", [r"Qu'arrive-t-il \1 ?", r"Que fait le serveur \1 ?", r"Que se produit-il \1 ?"]),
    ],
    "en": [
        (r"^How do I (.*?)\?$",
         [r"How can I \1?", r"How to \1?", r"How to \1", r"What is the way to \1?", r"How could I \1?", r"I want to \1",
          r"I would like to \1", r"I need to \1", r"Can I \1?", r"Is it possible to \1?", r"Explain how to \1",
          r"What should I do to \1?", r"Show me how to \1", r"How does one \1?", r"How would I \1?"]),
        (r"^What is (.*?) for\?$",
         [r"What does \1 do?", r"What is \1?", r"Explain \1", r"What does \1 mean?", r"What is the purpose of \1?",
          r"When should I use \1?", r"\1", r"Tell me about \1", r"What's \1 for?", r"Why use \1?"]),
        (r"^What is (.*?)\?$", [r"What's \1?", r"Explain \1", r"Tell me about \1", r"Define \1", r"What does \1 mean?"]),
        (r"^What does (.*?) mean\?$",
         [r"What is the meaning of \1?", r"What's the meaning of \1?", r"Explain \1", r"What is \1?", r"Why \1?"]),
        (r"^Which option (.*?)\?$",
         [r"What option \1?", r"Which flag \1?", r"Which parameter \1?", r"Is there an option that \1?", r"What flag \1?"]),
        (r"^Which route (.*?)\?$", [r"Which endpoint \1?", r"Which URL \1?", r"What route \1?", r"Which path \1?"]),
        (r"^Where (?:is|are) (.*?)\?$",
         [r"Where can I find \1?", r"Where do I find \1?", r"I am looking for \1", r"Where do I see \1?"]),
        (r"^What happens (.*?)\?$", [r"What does the server do \1?", r"What will happen \1?", r"What occurs \1?"]),
        (r"^Which (.*)$", [r"What \1"]),
    ],
}
SYNONYMS = {
    "fr": [["démarrer", "lancer", "mettre en route"], ["arrêter", "stopper", "couper"], ["changer", "modifier"],
           ["choisir", "sélectionner"], ["définir", "fixer", "régler"], ["obtenir", "avoir", "récupérer"],
           ["jetons", "tokens"], ["jeton", "token"], ["route", "endpoint"], ["limiter", "borner", "plafonner"],
           ["afficher", "montrer"], ["réponse", "sortie"], ["dossier", "répertoire"], ["logs", "journaux"],
           ["utiliser", "employer"], ["activer", "mettre en place"], ["voir", "lire", "trouver"], ["requête", "demande"],
           ["réglages", "paramètres"], ["paramètre", "champ"], ["simultanées", "en parallèle"], ["ids", "identifiants"],
           ["exiger", "imposer", "demander"], ["corrompu", "abîmé"], ["flux", "stream"], ["générer", "produire"],
           ["serveur", "service"], ["mesurer", "évaluer"], ["benchmark", "bench"], ["charger", "ouvrir"]],
    "en": [["start", "launch", "run"], ["stop", "shut down", "end"], ["change", "modify"], ["choose", "pick", "select"],
           ["set", "define", "configure"], ["get", "obtain", "have"], ["route", "endpoint"], ["limit", "bound", "cap"],
           ["show", "print", "display"], ["answer", "response", "reply"], ["folder", "directory"], ["use", "employ"],
           ["enable", "turn on", "set up"], ["see", "read", "find"], ["option", "flag"], ["settings", "parameters"],
           ["parameter", "field"], ["concurrent", "simultaneous", "parallel"], ["require", "demand"],
           ["corrupt", "damaged", "broken"], ["generate", "produce"], ["server", "service"], ["measure", "evaluate"],
           ["benchmark", "bench"], ["load", "open"], ["refused", "rejected"], ["accept", "take"], ["several", "multiple"]],
}
PLAIN_IDS = ("hello", "thanks", "bye")  # courtesy has no polite wrapping of its own
SYSTEMS = ["Tu es un assistant utile.", "You are a helpful assistant.", "Réponds brièvement.", "Be concise.",
           "Tu es l'assistant du serveur mirai.", "You are the assistant of the mirai server.",
           "Réponds dans la langue de la question.", "You are a helpful, honest assistant. Answer shortly."]


def read(name):
    """Rows of a JSONL file beside this module."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def normal(text):
    """Lower case, no accents, words only: two questions with one normal form count as the same question."""
    bare = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", bare))


def bare(word):
    """A word without its punctuation, in lower case."""
    return word.lower().strip("?!.,;:`\"'")


def load():
    """(faq rows, held-out rows); asserts that ids match and that no held-out question is a training question."""
    faq, held = read("faq.jsonl"), read("paraphrases.jsonl")
    ids = {row["id"] for row in faq}
    assert len(ids) == len(faq), "duplicate id in faq.jsonl"
    assert {row["id"] for row in held} == ids, "every FAQ row needs held-out paraphrases, and no others exist"
    owner = {}
    for row in faq:
        for question in [row["question"], *row["paraphrases"]]:
            other = owner.setdefault(normal(question), row["id"])
            assert other == row["id"], f"{question!r} belongs to {other} and {row['id']}"
    for row in held:
        assert normal(row["question"]) not in owner, f"held-out question is trained on: {row['question']!r}"
    return faq, held


class Augmenter:
    """Seeded variations of training questions."""

    def __init__(self, faq, held, rng):
        self.held = {normal(row["question"]) for row in held}
        self.rng = rng
        # Words that many rows of a language use carry no topic; how questions begin before the first topic word
        # gives frames, into which the rest of any other question fits.
        self.common, self.frames = {}, {}
        for lang in FORMS:
            rows = [[q.split() for q in (r["question"], *r["paraphrases"])] for r in faq if r["lang"] == lang]
            seen = Counter(w for row in rows for w in {bare(w) for q in row for w in q})
            self.common[lang] = {w for w, n in seen.items() if n >= 12}
            starts = Counter(s for row in rows for s in {" ".join(q[: self.topic_at(q, lang)]) for q in row})
            self.frames[lang] = sorted(s for s, n in starts.items() if s and n >= 2)

    def topic_at(self, words, lang):
        """Index of the first word that carries the topic; the number of words where none does."""
        return next((i for i, w in enumerate(words) if bare(w) not in self.common[lang]), len(words))

    def vary(self, row):
        """One training question for a FAQ row; never a held-out one."""
        sources = [row["question"], *row["paraphrases"]]
        for _ in range(20):
            text = row["question"] if self.rng.random() < 0.1 else self.rng.choice(sources)
            if self.rng.random() < 0.8:
                plain = row["id"].startswith(PLAIN_IDS)
                text = self.reword(text, row["lang"], plain)
                if not plain and self.rng.random() < 0.35:
                    text = self.shake(text, sources, row["lang"])
                text = self.scruff(text)
            if normal(text) not in self.held and text.strip():
                return text.strip()
        return row["question"]

    def reword(self, text, lang, plain):
        rng = self.rng
        if rng.random() < 0.5:
            for pattern, forms in FORMS[lang]:
                if re.match(pattern, text):
                    text = re.sub(pattern, rng.choice(forms), text)
                    break
        for group in SYNONYMS[lang]:
            for word in group:
                pattern = rf"\b{word}\b"
                if re.search(pattern, text) and rng.random() < 0.35:
                    text = re.sub(pattern, rng.choice(group), text, count=1)
                    break
        if plain:
            return text
        if rng.random() < 0.2:
            head = text if text[1:2].isupper() else text[:1].lower() + text[1:]
            text = rng.choice(OPENINGS[lang]) + head
        if rng.random() < 0.1:
            body, mark = re.match(r"(.*?)( ?\?)?$", text, re.DOTALL).groups()
            text = body + rng.choice(CLOSINGS[lang]) + (mark or "")
        return text

    def shake(self, text, sources, lang):
        """Keeps the topic words and disturbs the rest, so that the topic words alone decide the answer."""
        rng, common = self.rng, self.common[lang]
        words = text.split()
        at = self.topic_at(words, lang)
        kind = rng.random()
        if kind < 0.5 and at < len(words):  # the topic in another question's frame
            return f"{rng.choice(self.frames[lang])} {' '.join(words[at:])}"
        if kind < 0.75:  # words get lost, mostly those without a topic; one of each sort stays
            kept = [w for w in words if rng.random() > (0.35 if bare(w) in common else 0.12)]
            sorts = {bare(w) in common for w in words}
            return " ".join(kept) if {bare(w) in common for w in kept} == sorts else text
        if kind < 0.85:  # two wordings in one message
            return f"{text} {rng.choice(sources)}"
        if kind < 0.95:  # words without a topic slip in
            for _ in range(rng.randint(1, 2)):
                words.insert(rng.randrange(len(words) + 1), rng.choice(sorted(common)))
        else:
            rng.shuffle(words)
        return " ".join(words)

    def scruff(self, text):
        """Case, accents, punctuation, blanks and a rare slip of the finger."""
        rng = self.rng
        if rng.random() < 0.25:
            text = text.lower()
        elif rng.random() < 0.02:
            text = text.upper()
        if rng.random() < 0.15:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
        if rng.random() < 0.3:
            text = text.rstrip(" ?!.")
        elif rng.random() < 0.3:
            text = text.replace(" ?", "?")
        elif "?" not in text and rng.random() < 0.15:
            text += rng.choice([" ?", "?", ".", " !"])
        if rng.random() < 0.1:
            text = text.replace("'", "’")
        if rng.random() < 0.08:
            text = re.sub(r"[-_`/]", " ", text)
        words = text.split(" ")
        if len(words) > 4 and rng.random() < 0.12:  # a short word is lost
            short = [i for i, w in enumerate(words) if len(w) <= 3 and w.isalpha()]
            if short:
                words.pop(rng.choice(short))
                text = " ".join(words)
        if len(text) > 8 and rng.random() < 0.08:  # two letters change places
            i = rng.randrange(1, len(text) - 2)
            if text[i].isalpha() and text[i + 1].isalpha():
                text = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
        return text
