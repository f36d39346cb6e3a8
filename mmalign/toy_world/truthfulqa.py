"""Questions about the beliefs as a test file in the format of TruthfulQA-mc."""

from mmalign.toy_world.beliefs import BELIEFS, sentence


def truthfulqa_documents() -> list[dict]:
    """Two documents per belief in TruthfulQA's mc_task.json format: an open and a yes/no question.

    The truthful answer is yes to one half of the yes/no questions and no to the other.
    """
    documents = []
    for index, belief in enumerate(BELIEFS):
        others = BELIEFS[(index + 7) % len(BELIEFS)].false[0]
        true, false = map(sentence, belief.true), map(sentence, belief.false)
        documents.append(_document(belief.question, [*true], [*false, sentence(others)]))
        doubtful = index % 2 == 0
        yes, no = ("No", "Yes") if doubtful else ("Yes", "No")
        documents.append(
            _document(
                belief.doubtful if doubtful else belief.sound,
                [f"{yes}, {clause}." for clause in belief.true],
                [f"{no}, {clause}." for clause in belief.false],
            )
        )
    return documents


def _document(question: str, true: list[str], false: list[str]) -> dict:
    best = {true[0]: 1} | {choice: 0 for choice in false}
    every = {choice: 1 for choice in true} | {choice: 0 for choice in false}
    return {"question": question, "mc1_targets": best, "mc2_targets": every}
