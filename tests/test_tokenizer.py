"""tokenizer.py: transformers' tokenizer and ours agree token for token, read each other's files, and every error.

Characters younger than this Python's Unicode are left out: our `regex` and their library know different ones of them.
"""
import copy
import json
import pickle
import unicodedata
import warnings

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sdcourse.tokenizer import END, START, CLIPTokenizer, learn_merges, learn_tokenizer

CAPTIONS = ['a red seven', 'a bold red 7 left of a blue two', 'un sette rosso, a sinistra di un due blu', "it's a 3!",
            'un cane marrone è più carino', 'seven sevens and eleven elephants', 'the picture of a café 😀'] * 3


@pytest.fixture(scope='module')
def learned(): return learn_tokenizer(CAPTIONS, 60)


def token(content, normalized=True):
    "A special token as the published files describe it"
    return dict(content=content, lstrip=False, normalized=normalized, rstrip=False, single_word=False)


def flavours():
    "tokenizer_config.json and special_tokens_map.json as they are found: by name"
    typed = lambda t: {'__type': 'AddedToken', **token(t)}
    base = dict(add_prefix_space=False, do_lower_case=True, errors='replace', tokenizer_class='CLIPTokenizer',
                model_max_length=77)
    sd1 = dict(base, bos_token=typed(START), eos_token=typed(END), unk_token=typed(END), pad_token=END)
    table = dict(bos_token=token(START), eos_token=token(END), unk_token=token(END), pad_token=END)
    plain = dict(bos_token=START, eos_token=END, unk_token=END, pad_token='!')
    added = {'0': token('!', False), '572': token(START), '573': token(END, False)}
    return {'bare': (None, None), 'sd1': (sd1, table), 'sd2': (dict(sd1, pad_token='!'), dict(table, pad_token='!')),
            'map': (base, dict(table, pad_token='!')), 'plain': (dict(base, **plain), None),
            'added': (dict(base, **plain, added_tokens_decoder={k: dict(v, special=True) for k, v in added.items()}),
                      table)}


def write(folder, tokenizer, config=None, table=None):
    "A folder as published ones are: vocab.json, merges.txt and what is given"
    folder.mkdir(exist_ok=True)
    files = {'vocab.json': json.dumps(tokenizer.vocab), 'tokenizer_config.json': config and json.dumps(config),
             'merges.txt': '\n'.join(['#version: 0.2', *map(' '.join, tokenizer.merges), '']),
             'special_tokens_map.json': table and json.dumps(table)}
    for name, text in files.items():
        if text: (folder/name).write_text(text, encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def pairs(learned, tmp_path_factory):
    "By flavour: our tokenizer and theirs, from the same folder"
    top = tmp_path_factory.mktemp('tokenizers')
    folders = {k: write(top/k, learned, *files) for k, files in flavours().items()}
    return {k: (CLIPTokenizer.from_pretrained(f), transformers.CLIPTokenizer.from_pretrained(f))
            for k, f in folders.items()}


def known(text): return all(unicodedata.category(c) not in ('Cn', 'Cs') for c in unicodedata.normalize('NFC', text))


letters = st.characters(exclude_categories=['Cn', 'Cs'])
SNIPPETS = [START, END, START.upper(), '<|EndOfText|>', '!', "'s", "'LL", "' ve", '</w>', '<|', '|>', 'red', ' seven ',
            '7', '77', '²', 'Ⅷ', '一', '七つ', '\u0301', 'e\u0301', '\u0338', '\u200d', '👩\u200d🎨', '🇮🇹', 'İ', 'ΑΣ',
            'ß', 'ﬁ', '\x00', '\x1c', '\x85', '\u3000', '\t\n', '_', 'ǅ', '각', '\u1100\u1161', "it's", '’', 'ſ',
            '\u212a']
parts = st.one_of(st.sampled_from(SNIPPETS), st.text(letters, max_size=4))
texts = st.one_of(st.text(letters, max_size=40), st.text(max_size=40).filter(known),
                  st.lists(parts, max_size=12).map(''.join))


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=texts)
@example(text='')
@example(text=' \t\n\u3000\x1c ')
@example(text=END + '\u0338 ' + END.upper() + '\u0338')
@example(text='İ\u0316')  # its small letter is no longer normalized: once must be enough
@example(text='A red SEVEN, left of a blue two! '*700)
@example(text='seven'*1500)
@example(text='è😀7\x00'*900)
def test_token_for_token(pairs, text):
    assume(known(text))
    for name, (ours, theirs) in pairs.items():
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, name
        assert ours.tokenize(text) == theirs.tokenize(text)
        for skip in (False, True): assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.filterwarnings('ignore:.max_length. is ignored')
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=st.lists(texts, min_size=1, max_size=4), length=st.integers(2, 40), data=st.data())
def test_rows(pairs, batch, length, data):
    assume(all(map(known, batch)))
    ours, theirs = pairs[data.draw(st.sampled_from(sorted(pairs)))]
    options = dict(padding=data.draw(st.sampled_from(['max_length', 'longest', True])), max_length=length,
                   truncation=data.draw(st.booleans()), return_tensors='pt')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = ours(batch, **options)
    if options['padding'] == 'max_length' and not options['truncation']:  # theirs refuses rows that are longer
        options['max_length'] = found.input_ids.shape[1]
    expected = theirs(batch, **options)
    assert found.keys() == expected.keys() == {'input_ids', 'attention_mask'}
    for key in expected: assert torch.equal(found[key], expected[key]) and found[key].dtype == torch.int64
    assert ours.batch_decode(found.input_ids) == theirs.batch_decode(expected.input_ids)
    cut = options['truncation'] and max(len(ours.encode(t)) for t in batch) > length
    assert bool([w for w in caught if 'cut off' in str(w.message)]) == cut


def test_warning_names_what_was_cut(learned):
    with pytest.warns(UserWarning, match='only 6 ids fit.*cut off: blue two$') as caught:
        ids = learned(['one', 'a red and a blue two'], max_length=6, truncation=True).input_ids
    assert caught[0].filename == __file__
    assert ids.shape == (2, 6) and ids[1, -1] == learned.eos_token_id


@pytest.mark.parametrize('name', flavours())
def test_special_tokens(pairs, name):
    ours, theirs = pairs[name]
    for role in ('bos', 'eos', 'unk', 'pad'):
        for what in (f'{role}_token', f'{role}_token_id'): assert getattr(ours, what) == getattr(theirs, what), what
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    assert ours.vocab == theirs.get_vocab() and len(ours) == len(theirs)
    assert ours.model_max_length == 77


@pytest.mark.parametrize('name', flavours())
def test_each_reads_what_the_other_wrote(pairs, name, tmp_path):
    ours, theirs = pairs[name]
    odd = 'Red <|ENDOFTEXT|> seven! <|STARTOFTEXT|> <|endoftext|>\u0338 7?'
    assert ours.save_pretrained(tmp_path/'a') == tmp_path/'a'
    assert {p.name for p in (tmp_path/'a').iterdir()} == {
        'vocab.json', 'merges.txt', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'}
    theirs.save_pretrained(tmp_path/'b')
    assert {p.name for p in (tmp_path/'b').iterdir()} == {'tokenizer.json', 'tokenizer_config.json'}
    for folder in (tmp_path/'a', tmp_path/'b'):
        for t in (CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(tmp_path, folder.name)):
            assert t.encode(odd) == theirs(odd).input_ids
            assert (t.merges, t.normalized, t.special) == (ours.merges, ours.normalized, ours.special)
            assert t.model_max_length == 77
        for kind in (transformers.CLIPTokenizer, transformers.AutoTokenizer):
            t = kind.from_pretrained(folder)
            assert t(odd).input_ids == theirs(odd).input_ids and type(t) is type(theirs)
            if folder.name == 'a': assert t.model_max_length == 77
    assert Tokenizer.from_file(str(tmp_path/'a'/'tokenizer.json')).encode(odd).ids == theirs(odd).input_ids
    for extra in ('tokenizer.json', 'special_tokens_map.json'): (tmp_path/'a'/extra).unlink()
    assert transformers.CLIPTokenizer.from_pretrained(tmp_path/'a')('a red 7').input_ids == ours.encode('a red 7')


def test_copies(learned):
    for t in (copy.deepcopy(learned), pickle.loads(pickle.dumps(learned))):
        assert t.encode('seven elephants') == learned.encode('seven elephants')


def test_letters_that_the_vocabulary_lacks(tmp_path):
    vocab = {'a': 0, 'b</w>': 1, 'ab</w>': 2, START: 3, END: 4}
    ours = CLIPTokenizer(vocab, [('a', 'b</w>')])
    theirs = transformers.CLIPTokenizer.from_pretrained(write(tmp_path/'x', ours))
    for text in ('ab', 'aab', 'abc ab', 'xyz', 'é'): assert ours.encode(text) == theirs(text).input_ids


def test_stable_diffusion_pipelines_calls(learned):
    "What StableDiffusionPipeline.encode_prompt and its loader ask of a tokenizer"
    ids = learned('a red seven', padding='max_length', max_length=learned.model_max_length, truncation=True,
                  return_tensors='pt')
    assert ids.input_ids.shape == ids.attention_mask.shape == (1, 77)
    long = learned('seven '*90, padding='longest', return_tensors='pt').input_ids
    assert long.shape == (1, 92)
    assert learned.batch_decode(long[:, 76:-1]) == [' '.join(['seven']*15)]
    assert not set(learned.tokenize('a red seven')) & set(learned.added_tokens_encoder)


# learning

def test_vocabulary_is_as_clips(learned):
    ids = sorted(learned.vocab, key=learned.vocab.get)
    assert list(learned.vocab.values()) == list(range(len(ids)))
    assert ids[:2] == ['!', '"'] and ids[256] == '!</w>' and ids[-2:] == [START, END]
    assert ids[512:-2] == [a + b for a, b in learned.merges]
    assert len(learned) == 514 + 60
    for text in ('sette', 'a BOLD red 7', 'café 😀'): assert learned.decode(learned.encode(text), True) == text.lower()


def test_merges_as_the_library_learns_them():
    "Three merges without a tie: p u (17 times), h u (15), pu n (12)"
    words = ['hug']*10 + ['pug']*5 + ['pun']*12 + ['bun']*4 + ['hut']*5
    library = Tokenizer(models.BPE(end_of_word_suffix='</w>'))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=11, end_of_word_suffix='</w>', show_progress=False)
    library.train_from_iterator(words, trainer)
    theirs = [tuple(m) for m in json.loads(library.to_str())['model']['merges']]
    assert theirs and learn_merges(words, len(theirs)) == theirs


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text('ab c1', min_size=1, max_size=12), min_size=1, max_size=6), st.integers(0, 30))
def test_merges_are_learned_once_each(captions, n):
    merges = learn_merges(captions, n)
    assert len(set(merges)) == len(merges) <= n
    assert merges == learn_merges(captions[::-1], n)  # the order of the captions is nothing
    tokenizer = learn_tokenizer(captions, 1000)
    for word in ' '.join(captions).split():
        if word.isalpha(): assert len(tokenizer.encode(word)) == 3  # all merged


# bad input

@pytest.mark.parametrize('texts, message', [
    (7, 'int 7'), (None, 'NoneType None'), ([], 'an empty batch'), ((), 'an empty batch'), (['a', 7], 'int 7'),
    (b'red', 'int 114'), ([['a']], "list"), (['a', None], 'NoneType')])
def test_texts(learned, texts, message):
    for call in (learned, lambda t: learn_merges(t, 3)):
        with pytest.raises(ValueError, match='texts are a string') as e: call(texts)
        assert message in str(e.value)
    with pytest.raises(ValueError, match='texts are a string'): learned.encode(texts)


def test_half_a_character(learned):
    with pytest.raises(ValueError, match='surrogates not allowed'): learned.encode('\ud800')


@pytest.mark.parametrize('options, message', [
    (dict(max_length=1), 'max_length .* got 1'), (dict(max_length=2.5), 'got 2.5'), (dict(max_length=-3), 'got -3'),
    (dict(padding='left'), "got 'left'"), (dict(padding=False), 'got False'), (dict(return_tensors='np'), "'np'")])
def test_options(learned, options, message):
    with pytest.raises(ValueError, match=message): learned('a red seven', **options)


def test_unknown_ids(learned):
    for ids in ([0, 999], torch.tensor([999]), [[0], [999]], [-1]):
        with pytest.raises(ValueError, match=r'no token has the id (999|-1); .* has 574 tokens'): learned.decode(ids)
    assert learned.decode([]) == '' and learned.batch_decode([]) == ''


@pytest.mark.parametrize('name, change, message', [
    ('vocab.json', lambda t: t[:-9], 'not valid JSON'),
    ('vocab.json', lambda t: '[]', 'must hold a JSON object'),
    ('vocab.json', lambda t: t.replace('"!": 0', '"!": 1'), 'an id of its own'),
    ('vocab.json', lambda t: t.replace('"!": 0', '"!": "0"'), 'an id of its own'),
    ('vocab.json', lambda t: t.replace('endoftext', 'end'), r"574 tokens lacks '<\|endoftext\|>'"),
    ('vocab.json', lambda t: t.replace('"seven</w>"', '"s8</w>"'), 'merge .* token of the vocabulary'),
    ('merges.txt', lambda t: t.replace('\n', '\ne\n', 1), "got 'e'"),
    ('merges.txt', lambda t: t.replace('\n', '\ne n x\n', 1), "got 'e n x'"),
    ('merges.txt', lambda t: '\n'.join(t.split('\n')[::-1]), 'merge 1 must'),
    ('merges.txt', lambda t: t + 'q zebra\n', "got 'q zebra'"),
    ('merges.txt', lambda t: t.encode() + b'\xff', 'undamaged .* UnicodeDecodeError'),
    ('merges.txt', lambda t: None, 'undamaged vocab.json and merges.txt, or tokenizer.json'),
    ('vocab.json', lambda t: None, 'undamaged vocab.json and merges.txt, or tokenizer.json'),
    ('tokenizer_config.json', lambda t: '{', 'not valid JSON'),
    ('tokenizer_config.json', lambda t: '{"model_max_length": "long"}', 'undamaged'),
    ('tokenizer_config.json', lambda t: '{"pad_token": {"text": 1}}', 'undamaged'),
    ('tokenizer_config.json', lambda t: '{"pad_token": "<pad>"}', "lacks '<pad>'"),
    ('tokenizer.json', lambda t: '{"model": {"vocab": 7}}', 'undamaged')])
def test_damaged_files(learned, tmp_path, name, change, message):
    learned.save_pretrained(tmp_path)
    if name == 'tokenizer.json': (tmp_path/'vocab.json').unlink()
    else: (tmp_path/'tokenizer.json').unlink()
    if name == 'tokenizer_config.json': (tmp_path/'special_tokens_map.json').unlink()
    text = change((tmp_path/name).read_text(encoding='utf-8'))
    if text is None: (tmp_path/name).unlink()
    else: (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message): CLIPTokenizer.from_pretrained(tmp_path)


def test_no_folder(learned, tmp_path):
    with pytest.raises(ValueError, match='unknown weights'): CLIPTokenizer.from_pretrained(tmp_path/'nowhere')
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='is a file'): learned.save_pretrained(tmp_path/'file')


@pytest.mark.parametrize('length', [0, 1, -3, 2.5, True])
def test_an_impossible_length_is_refused(learned, length):
    with pytest.raises(ValueError, match='max_length must be a number'): learned('a red seven', max_length=length)
