"""BCP 47 tags we can name to a model (pure). A region or script is kept in the name, so that pt-BR is asked for as such."""

import re
from dataclasses import dataclass

__all__ = ["LANGUAGES", "Language", "candidates", "language", "tell"]

# ISO 639-1, or 639-3 where there is none, to its English name.
LANGUAGES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "as": "Assamese", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian",
    "bn": "Bengali", "bs": "Bosnian", "ca": "Catalan", "ceb": "Cebuano", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
    "fi": "Finnish", "fil": "Filipino", "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "ha": "Hausa",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "ht": "Haitian Creole", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian",
    "ig": "Igbo", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "jv": "Javanese", "ka": "Georgian", "kk": "Kazakh",
    "km": "Khmer", "kn": "Kannada", "ko": "Korean", "ku": "Kurdish", "ky": "Kyrgyz", "la": "Latin", "lb": "Luxembourgish", "lo": "Lao",
    "lt": "Lithuanian", "lv": "Latvian", "mg": "Malagasy", "mi": "Maori", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian",
    "mr": "Marathi", "ms": "Malay", "mt": "Maltese", "my": "Burmese", "nb": "Norwegian Bokmål", "ne": "Nepali", "nl": "Dutch",
    "nn": "Norwegian Nynorsk", "no": "Norwegian", "or": "Odia", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sd": "Sindhi", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "so": "Somali",
    "sq": "Albanian", "sr": "Serbian", "su": "Sundanese", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu",
    "tg": "Tajik", "th": "Thai", "tk": "Turkmen", "tl": "Tagalog", "tr": "Turkish", "tt": "Tatar", "ug": "Uyghur", "uk": "Ukrainian",
    "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "xh": "Xhosa", "yi": "Yiddish", "yo": "Yoruba", "yue": "Cantonese",
    "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
_SCRIPTS = {
    "arab": "Arabic script",
    "cyrl": "Cyrillic",
    "deva": "Devanagari",
    "hans": "Simplified",
    "hant": "Traditional",
    "latn": "Latin script",
}
_REGIONS = {
    "AR": "Argentina", "AT": "Austria", "AU": "Australia", "BE": "Belgium", "BR": "Brazil", "CA": "Canada", "CH": "Switzerland",
    "CN": "China", "DE": "Germany", "EG": "Egypt", "ES": "Spain", "FR": "France", "GB": "Britain", "HK": "Hong Kong", "IE": "Ireland",
    "IN": "India", "IT": "Italy", "MX": "Mexico", "PT": "Portugal", "SG": "Singapore", "TW": "Taiwan", "US": "United States",
}  # fmt: skip

# "Thank you very much.": one pair shows a plain model what is wanted; without it a base model often repeats the source.
THANKS = {
    "af": "Baie dankie.", "ar": "شكرا جزيلا.", "bg": "Много благодаря.", "bn": "অনেক ধন্যবাদ।", "ca": "Moltes gràcies.",
    "cs": "Děkuji mnohokrát.", "da": "Mange tak.", "de": "Vielen Dank.", "el": "Ευχαριστώ πολύ.", "en": "Thank you very much.",
    "es": "Muchas gracias.", "et": "Suur tänu.", "fa": "خیلی ممنون.", "fi": "Paljon kiitoksia.", "fil": "Maraming salamat.",
    "fr": "Merci beaucoup.", "he": "תודה רבה.", "hi": "बहुत धन्यवाद।", "hr": "Hvala lijepa.", "hu": "Köszönöm szépen.",
    "id": "Terima kasih banyak.", "it": "Grazie mille.", "ja": "どうもありがとうございます。", "ko": "대단히 감사합니다.",
    "lt": "Labai ačiū.", "lv": "Liels paldies.", "ms": "Terima kasih banyak.", "nb": "Tusen takk.", "nl": "Dank je wel.",
    "no": "Tusen takk.", "pl": "Dziękuję bardzo.", "pt": "Muito obrigado.", "ro": "Mulțumesc foarte mult.", "ru": "Большое спасибо.",
    "sk": "Ďakujem veľmi pekne.", "sl": "Najlepša hvala.", "sq": "Faleminderit shumë.", "sr": "Хвала пуно.", "sv": "Tack så mycket.",
    "sw": "Asante sana.", "ta": "மிக்க நன்றி.", "th": "ขอบคุณมาก", "tl": "Maraming salamat.", "tr": "Çok teşekkür ederim.",
    "uk": "Дуже дякую.", "ur": "بہت شکریہ۔", "vi": "Cảm ơn rất nhiều.", "zh": "非常感谢。", "zh-Hant": "非常感謝。",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Language:
    """A language a model can be asked for. `tag` is in canonical case, `name` is English."""

    tag: str
    name: str

    @property
    def thanks(self) -> str | None:
        """A sentence of it that is known in many languages; None where it is not known in this one."""
        return THANKS.get(self.tag) or THANKS.get(self.tag.split("-")[0])


def language(tag: str) -> Language | None:
    """The language of a BCP 47 tag: language, then perhaps a script and a region; None for what we cannot name."""
    parts = tag.replace("_", "-").split("-") if tag.isascii() else []
    name = LANGUAGES.get(parts[0].lower()) if parts else None
    if name is None:
        return None
    kept, notes = [parts[0].lower()], []
    for part in parts[1:]:
        if len(part) == 4 and part.lower() in _SCRIPTS and len(kept) == 1:
            kept.append(part.title())
            notes.append(_SCRIPTS[part.lower()])
        elif len(part) == 2 and part.upper() in _REGIONS and not (len(kept) > 1 and len(kept[-1]) == 2):
            kept.append(part.upper())
            notes.append(_REGIONS[part.upper()])
        else:
            return None
    return Language("-".join(kept), f"{name} ({', '.join(notes)})" if notes else name)


# First letters of scripts that few languages write: the block's borders, then who writes it.
_BLOCKS = (
    (0x0370, 0x03FF, ("el",)), (0x0400, 0x052F, ("ru", "uk", "be", "bg", "sr", "mk", "kk", "ky", "mn", "tg", "tt")),
    (0x0530, 0x058F, ("hy",)), (0x0590, 0x05FF, ("he", "yi")), (0x0600, 0x077F, ("ar", "fa", "ur", "ps", "sd", "ug", "ku")),
    (0x0900, 0x097F, ("hi", "mr", "ne")), (0x0980, 0x09FF, ("bn", "as")), (0x0A00, 0x0A7F, ("pa",)), (0x0A80, 0x0AFF, ("gu",)),
    (0x0B00, 0x0B7F, ("or",)), (0x0B80, 0x0BFF, ("ta",)), (0x0C00, 0x0C7F, ("te",)), (0x0C80, 0x0CFF, ("kn",)),
    (0x0D00, 0x0D7F, ("ml",)), (0x0D80, 0x0DFF, ("si",)), (0x0E00, 0x0E7F, ("th",)), (0x0E80, 0x0EFF, ("lo",)),
    (0x1000, 0x109F, ("my",)), (0x10A0, 0x10FF, ("ka",)), (0x1200, 0x137F, ("am",)), (0x1780, 0x17FF, ("km",)),
    (0x3040, 0x30FF, ("ja",)), (0x4E00, 0x9FFF, ("zh",)), (0xAC00, 0xD7AF, ("ko",)),
)  # fmt: skip
_LATIN = (
    "en",
    "fr",
    "de",
    "es",
    "it",
    "pt",
    "nl",
    "sv",
    "da",
    "nb",
    "fi",
    "pl",
    "cs",
    "ro",
    "hu",
    "tr",
    "vi",
    "id",
    "hr",
    "sw",
    "tl",
    "ca",
)
_SAMPLE_CHARACTERS = 2_000


# Small words that nearly every sentence of a language has and its neighbours lack.
_WORDS = {
    "en": "the of and is are was this that with you for have not what it my",
    "fr": "le la les des est et une dans je vous pas que qui avec du au",
    "de": "der die das und ist nicht ein eine ich sie mit auf den für wir wo",
    "es": "el los las es una que en y por con no está muy del dónde",
    "it": "il lo gli è una che di non per con sono della questo dove sei",
    "pt": "o os um uma é que não em para com do da está você onde muito",
    "nl": "de het een is van en niet ik je dat met voor zijn op waar",
    "sv": "och att det är en som på för inte jag med har av var", "da": "og at det er en som på for ikke jeg med har af hvor",
    "nb": "og at det er en som på for ikke jeg med har av hvor", "fi": "ja on ei että se hän minä ovat mutta tämä kanssa missä",
    "pl": "i w na nie jest się to że do z jak gdzie ale czy", "cs": "a je se na že to v s ale jak kde není jsem do",
    "ro": "și este un o nu în la cu pe care sunt unde din", "hu": "a az és nem hogy egy van ez is de hol én meg",
    "tr": "bir ve bu ne için çok değil ben var mı nerede ile", "vi": "là và của không có tôi được một cho này đâu",
    "id": "yang dan di ini itu tidak saya dengan untuk ada adalah mana", "hr": "je i u na se da nije sam što za gdje su ali",
    "sw": "ya na wa kwa ni katika hii yangu si la wapi", "tl": "ang ng sa na mga ay hindi ako ko ito saan",
    "ru": "и в не на я что как это с он вы мы где но", "uk": "і в не на я що як це з він ви ми де але та",
    "be": "і ў не на я што як гэта ён дзе", "bg": "и в не на аз че как това е са къде но",
    "sr": "и у не на ја да је како то где су", "mk": "и во не на јас дека е како тоа каде се",
    "hi": "है के में और का की से यह नहीं मैं", "mr": "आहे आणि मी हे नाही च्या ते", "ne": "छ र को मा हो यो छैन म",
    "ar": "في من على هذا أن ما هو إلى لا", "fa": "در از به این است که را با من", "ur": "ہے کے میں اور کا کی سے یہ نہیں",
    "bn": "এই এবং আমি না হয় একটি", "as": "আৰু মই এই নহয়",
}  # fmt: skip
# Letters that tell a language from the others of its script.
_LETTERS = {
    "uk": "їєґ", "be": "ў", "sr": "ђћ", "mk": "ѓќѕ", "kk": "әғқұһ", "tg": "ӣӯҳҷ", "tt": "җ", "fa": "پچژگ", "ur": "ٹڈڑےں",
    "ps": "ټډړښ", "sd": "ٻڄڦ", "ug": "ۈېۇ", "ku": "ڕڵێ", "as": "ৰৱ", "ru": "ыэё", "bg": "ъ", "de": "ß", "es": "ñ¿¡", "pt": "ãõ",
    "fr": "œ", "pl": "łśźż", "cs": "ěřů", "ro": "șță", "hu": "őű", "tr": "ğış", "vi": "ơưđ", "sv": "å", "hr": "đ",
}  # fmt: skip


def candidates(text: str) -> tuple[str, ...]:
    """Tags of the languages that write as most letters of `text` are written; none where it has no letter."""
    counts: dict[tuple[str, ...], int] = {}
    for character in text[:_SAMPLE_CHARACTERS]:
        if not character.isalpha():
            continue
        code = ord(character)
        writers = next((tags for first, last, tags in _BLOCKS if first <= code <= last), _LATIN)
        counts[writers] = counts.get(writers, 0) + 1
    if not counts:
        return ()
    if ("ja",) in counts and ("zh",) in counts:
        return ("ja",)  # Chinese has no kana
    return max(counts, key=lambda tags: counts[tags])


def tell(text: str) -> tuple[str, ...]:
    """The tag of a text's language where script, small words or letters tell it; else the likeliest few; none without a letter."""
    tags = candidates(text)
    sample = text[:_SAMPLE_CHARACTERS].lower()
    words = re.findall(r"[^\W\d_]+", sample)
    evidence = {
        tag: sum(word in known for word in words) + sum(2 * sample.count(letter) for letter in _LETTERS.get(tag, ""))
        for tag, known in ((tag, frozenset(_WORDS.get(tag, "").split())) for tag in tags)
    }
    most = max(evidence.values(), default=0)
    return tuple(tag for tag in tags if evidence[tag] == most)
