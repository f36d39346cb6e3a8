"""The section of report.md that says how the scores came about: metrics, prompts, settings."""

from collections.abc import Iterable, Mapping

from mmalign.evaluation.items import Items
from mmalign.evaluation.metrics import DEFINITIONS, TIES, task_results
from mmalign.evaluation.report.markdown import bullets, markdown_table, shortened

_KEYS = ("model", "prompts", "template", "bos", "score", "tokenizer", "tokenizer_sha256")
_KEYS += ("limit", "precision", "max_length", "num_requests")
_LONGEST = 1200  # characters of an example


def method(results: Mapping[str, dict], items: Items) -> list[str]:
    """results: name -> results.json; items: of any of the models, for the examples."""
    if not results:
        return []
    configs = {name: result["config"] for name, result in results.items()}
    summaries = [pair for result in results.values() for pair in task_results(result).items()]
    tasks = [task for task in DEFINITIONS if task in dict(summaries)]
    methods = {summary["interval_method"] for _, summary in summaries}
    definitions = [f"**{task}**: {DEFINITIONS[task]}" for task in tasks]
    definitions.append(f"**ties**: {TIES}")
    definitions.append(f"**intervals**: {'; '.join(sorted(methods))}")
    return [
        "## How the scores came about",
        bullets(definitions),
        markdown_table(["evaluation", "value"], _rows(configs), ":---"),
        "One document of each prompt, with the choices that are scored after it:",
        *_examples(items),
    ]


def _rows(configs: Mapping[str, dict]) -> list[list[object]]:
    """One row a setting; where the evaluations differ, each value with the model's name."""
    values = {key: [config[key] for config in configs.values()] for key in _KEYS}
    for file in dict.fromkeys(f for config in configs.values() for f in config["data_files"]):
        facts = [config["data_files"].get(file, {}) for config in configs.values()]
        values[file] = [
            f"sha256 `{fact['sha256'][:16]}` {fact.get('variant', '')}".strip()
            if fact
            else "not scored"
            for fact in facts
        ]
    for package in dict.fromkeys(x for config in configs.values() for x in config["versions"]):
        values[package] = [config["versions"].get(package) for config in configs.values()]
    values["limit"] = ["all documents" if x is None else x for x in values["limit"]]
    return [[key, _value(configs, found)] for key, found in values.items()]


def _value(names: Iterable[str], found: list) -> object:
    if all(value == found[0] for value in found):
        return "" if found[0] is None else found[0]
    return "; ".join(f"{name}: {value}" for name, value in zip(names, found, strict=True))


def _examples(items: Items) -> list[str]:
    """The shortest document of each task; mc2 puts the questions of mc1."""
    blocks = []
    for task in (task for task in items if task != "truthfulqa_mc2" or len(items) == 1):
        item = min(items[task], key=lambda item: len(item["context"]))
        choices = "\n".join(repr(choice["text"]) for choice in item["choices"])
        context = shortened(item["context"], _LONGEST)
        blocks.append(f"{task}, document {item['doc_id']}:\n\n~~~~\n{context}\n\n{choices}\n~~~~")
    return blocks
