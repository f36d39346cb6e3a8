"""Tokens of captions as the COCO caption evaluation has them, without Java.

pycocoevalcap runs Stanford CoreNLP 3.4.1's PTBTokenizer with -preserveLines -lowerCase and drops
punctuation. Of CoreNLP's rules these are the ones that captions need: at every place the longest
match of _PATTERNS is the next token, where two are equally long the first of them.
"""

import re

_LETTER = r"(?:[^\W\d_]|[\u0300-\u036f])"
_ALNUM = r"(?:[^\W_]|[\u0300-\u036f])"
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|drs|prof|sen|rep|lt|col|gen|rev|maj|sgt|capt|hon|jr|sr|esq|st|ste|ave|blvd|rd|mt|"
    "inc|co|cos|corp|ltd|plc|dept|bros|vs|etc|al|ft|jan|feb|apr|jun|jul|aug|sep|sept|oct|nov|dec|"
    "mon|tue|tues|wed|thu|thurs|fri|ala|ariz|calif|colo|conn|fla|minn|tenn|wisc"
)
# ordinary words in lower case
_CAPITAL_ABBREVIATIONS = "Wash|Mass|Miss|Ill|Mich|Ore|Ark|Pa|La|Mo|Ind|Del|Pres|Det|Tex|Mar"
_ANY = re.IGNORECASE
_PATTERNS = [
    re.compile(pattern, flags)
    for pattern, flags in (
        (r"&#\d+;", 0),
        (r"https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]", _ANY),
        (r"(?:[a-z0-9-]+\.)+(?:com|net|org|edu)(?:/[^\s\"<>|()]*[^\s\"<>|.!?(){},-])?", _ANY),
        (r"[a-z0-9][^\s\"<>|(){}@]*@(?:[\w-]+\.)+[\w-]+", _ANY),
        (r"[@#][a-z_]\w*", _ANY),
        (r"</?[a-z][^<>\s]*(?: [a-z][^<>]*)?>", _ANY),
        # numbers
        (r"[+-]?\d*(?:[.,:]\d+)+|[+-]?\d+", 0),
        (r"\d+(?:[ \xa0]\d+)?/\d+", 0),
        (r"\d+[-/]\d+[-/]\d+", 0),
        (r"\(\d{3}\)[ \xa0]?\d{3}[- ]\d{4}", 0),
        # words, with an inner stop, hyphen or slash, and an apostrophe that begins no clitic
        (rf"{_ALNUM}+(?:[.!?_]{_LETTER}{_ALNUM}*)*", 0),
        (rf"{_ALNUM}(?:{_ALNUM}|[.,])*(?:[-\u2011]{_ALNUM}+)+", 0),
        (rf"{_ALNUM}+(?:-{_LETTER}+){{0,2}}(?:/{_ALNUM}+(?:-{_LETTER}+){{0,2}}){{1,2}}", 0),
        (rf"[A-HJ-XZdlo]'{_LETTER}{{2,}}", 0),
        (rf"{_LETTER}*[aeiouy]'[aeiou]{_LETTER}*", _ANY),
        (r"[A-Z]+(?:[+&][A-Z]+)+", 0),
        (r"c(?:\+\+|#)", _ANY),
        # abbreviations
        (rf"(?:{_LETTER}\.)+|ph\.d\.|(?:{_ABBREVIATIONS})\.", _ANY),
        (rf"(?:{_CAPITAL_ABBREVIATIONS})\.", 0),
        (r"no\.(?=\s*\d)", _ANY),
        (r"(?:us|a|au|c|hk|nz|s)\$", _ANY),
        # clitics, decades, and 'n' with or without its second apostrophe
        (r"'(?:s|m|d|re|ve|ll|em|tis|twas|n'?)(?![^\W_])", _ANY),
        (r"n['`]t(?![^\W_])", _ANY),
        (r"'\d0s|'\d\d(?=\s|$)", 0),
        # signs
        (r"[:;=][-o*']?[()\[\]]", 0),
        (r"\.{3,}|--+|``|''|[!?]+|\*+|#+", 0),
        (r"\S", 0),
    )
]
_NOT = re.compile(r"n['`]t(?![^\W_])", _ANY)
_PLAIN = re.compile(r"([a-z]+)(?= |$)")  # most words of most captions
_TWO_WORDS = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
    "y'all": "y' all",
    "'tis": "'t is",
    "'twas": "'t was",
}
_SPELLED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
}  # fmt: skip
_DROPPED = {*"'`\".?!,:;-", "''", "``", "--", "---", "----"}
_CLEAN = {
    **dict.fromkeys("‘’‛‹›", "'"),
    **dict.fromkeys("“”«»", '"'),
    **dict.fromkeys("–—", " -- "),
    **dict.fromkeys("\0\u200b\u200d\ufe0f", " "),
    # Python counts them as letters
    **{sign: f" {sign} " for sign in "²³¹⁰⁴⁵⁶⁷⁸⁹½¼¾⅓⅔"},
    "…": " ... ",
    "\xad": "",
}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"'}
_CLEAN_TABLE = str.maketrans(_CLEAN)
_OTHER_PLANES = re.compile(r"[\U00010000-\U0010ffff]")  # emoji among them: Java drops them
_ENTITY = re.compile("|".join(_ENTITIES))


def ptb_tokens(caption: str) -> str:
    """The caption in lower case as tokens with blanks between them, without punctuation.

    A fraction after a number and a phone number hold a no-break space, as CoreNLP writes them.
    """
    text = _OTHER_PLANES.sub(" ", _ENTITY.sub(lambda x: _ENTITIES[x[0]], caption))
    text = text.translate(_CLEAN_TABLE)
    tokens, at = [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        token = _next_token(text, at)
        at += len(token)
        tokens.append(token)
    spelled = (_spell(token) for token in tokens)
    return " ".join(x for x in spelled if x and x not in _DROPPED)


def _next_token(text: str, at: int) -> str:
    plain = _PLAIN.match(text, at)
    if plain:
        return plain[0]
    matches = (pattern.match(text, at) for pattern in _PATTERNS)
    token = max((x[0] for x in matches if x), key=len)
    if len(token) > 1 and token.isalpha() and _NOT.match(text, at + len(token) - 1):
        return token[:-1]  # is + n't
    return token


def _spell(token: str) -> str:
    lower = token.lower()
    if lower in _TWO_WORDS:
        return _TWO_WORDS[lower]
    if set(lower) == {"."}:
        return ""
    if len(lower) > 1 and lower[0] in "(:;=" and lower[-1] in "()[]" or lower[:1] == "(":
        return "".join(_SPELLED.get(x, x) for x in lower).replace(" ", "\xa0")
    if re.fullmatch(r"\d+ \d+/\d+", lower):
        return lower.replace(" ", "\xa0")
    return _SPELLED.get(lower, lower)
