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

from sdcourse.tokenizer import END, START, CLIPTokenizer, learn_merges, learn_tokenizer, spell_out

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


def read(folder):
    "Our tokenizer and theirs from the same folder"
    return CLIPTokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope='module')
def folders(learned, tmp_path_factory):
    "Published folders by flavour"
    top = tmp_path_factory.mktemp('tokenizers')
    return {k: write(top/k, learned, *files) for k, files in flavours().items()}


@pytest.fixture(scope='module')
def pairs(folders):
    "By flavour: our tokenizer and theirs, from the same folder"
    return {k: read(folder) for k, folder in folders.items()}


def known(text): return all(unicodedata.category(c) not in ('Cn', 'Cs') for c in unicodedata.normalize('NFC', text))


letters = st.characters(exclude_categories=['Cn', 'Cs'])
SNIPPETS = [START, END, START.upper(), '<|EndOfText|>', '<|EndOfText|>!', '!', "'s", "'LL", "' ve", '</w>',
            '<|', '|>', 'red', ' seven ',
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
        t.add_tokens('elephants')
        assert t.encode('seven elephants') != learned.encode('seven elephants') and len(t) == len(learned) + 1


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


# tokens of one's own

OWN = ['<cat-toy>', '<cat-toy>_1', '<cat-toy>_10', '<Big CAFÉ>', 'my toy', 'q', 'red</w>', 'seven', '七', "'s"]
own_parts = st.one_of(parts, st.sampled_from([*OWN, '<CAT-TOY>', 'CAFE\u0301', '<big', 'my \t\u3000TOY', '_1', '_']))


def same(ours, theirs, text):
    ids = theirs(text).input_ids
    return (ours.encode(text) == ids and ours.tokenize(text) == theirs.tokenize(text)
            and all(ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip) for skip in (False, True)))


@pytest.fixture(scope='module')
def owners(folders):
    "Both tokenizers by flavour, with tokens added to each (a deep copy of theirs would decode differently)"
    both = {k: read(folder) for k, folder in folders.items()}
    for name, (ours, theirs) in both.items():
        assert theirs.add_tokens(OWN) == ours.add_tokens(OWN) == len(OWN), name
        assert theirs.add_tokens('<cat-toy>') == ours.add_tokens('<cat-toy>') == theirs.add_tokens('') == 0
    return both


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.lists(own_parts, max_size=12).map(''.join))
@example(text='A red <CAT-TOY>, two <cat-toy>_1s, <cat-toy>_10 <cat-toy>_2')
@example(text='x<cat-toy>y<cat-toy')
@example(text='<big \n CAFE\u0301> <BIG CAFÉ>')
@example(text='my toy, my\t TOY, my\u3000toy')
@example(text="seven sevens it's red red</w> 七つ")
def test_own_tokens(owners, text):
    assume(known(text))
    for name, (ours, theirs) in owners.items(): assert same(ours, theirs, text), name


@pytest.mark.parametrize('name', flavours())
def test_own_tokens_in_the_vocabulary(pairs, owners, name):
    (plain, _), (ours, theirs) = pairs[name], owners[name]
    assert ours.vocab == theirs.get_vocab() and ours.added_tokens_encoder == theirs.added_tokens_encoder
    assert len(ours) == len(theirs) == len(plain) + 8 == 582  # red</w> and q were there
    assert ours.vocab['<cat-toy>'] == 574 and not set(plain.added_tokens_encoder) & set(OWN)
    assert plain.encode('a <cat-toy>') != ours.encode('a <cat-toy>')


@pytest.mark.parametrize('name', flavours())
def test_own_tokens_are_saved(owners, name, tmp_path):
    ours, theirs = owners[name]
    theirs.save_pretrained(tmp_path/'b')
    ours.save_pretrained(tmp_path/'a')
    ours.save_pretrained(tmp_path/'c')
    for extra in ('tokenizer.json', 'special_tokens_map.json'): (tmp_path/'c'/extra).unlink()
    odd = 'A <CAT-TOY> <cat-toy>_10 <|ENDOFTEXT|>, my  toy <Big cafe\u0301> red!'
    for folder in (tmp_path/'a', tmp_path/'b', tmp_path/'c'):
        t = CLIPTokenizer.from_pretrained(folder)
        assert same(t, theirs, odd) and same(ours, transformers.CLIPTokenizer.from_pretrained(folder), odd)
        assert (t.vocab, t.added, t.normalized) == (ours.vocab, ours.added, ours.normalized)
        assert t.add_tokens(['<cat-toy>', '<new>']) == 1 and t.vocab['<new>'] == 582
    assert Tokenizer.from_file(str(tmp_path/'a'/'tokenizer.json')).encode(odd).ids == theirs(odd).input_ids


def test_spelled_out(learned):
    "As diffusers' pipelines do it"
    from diffusers.loaders import TextualInversionLoaderMixin
    t = copy.deepcopy(learned)
    t.add_tokens(['<x>', '<x>_1', '<x>_2', '<y>', '<z.>', '<z.>_1'])
    expected = {'a <x> <y>': 'a <x> <x>_1 <x>_2 <y>', '<x><z.>, <x>': '<x> <x>_1 <x>_2<z.> <z.>_1, <x> <x>_1 <x>_2',
                'a <x>_2': 'a <x>_2', '': '', 'red': 'red', '<z!>': '<z!>'}
    for text, wanted in expected.items():
        assert spell_out(t, text) == wanted == TextualInversionLoaderMixin()._maybe_convert_prompt(text, t)
    assert spell_out(learned, 'a <x>') == 'a <x>'


def test_old_file_of_added_tokens(learned, tmp_path):
    "As the first textual inversions were published: the vocabulary, and added_tokens.json beside it"
    config, table = flavours()['sd1']
    folder = write(tmp_path/'old', learned, config, table)
    (folder/'added_tokens.json').write_text(json.dumps({'<cat-toy>': 574, '<Dog-Toy>': 575}))
    ours, theirs = read(folder)
    assert ours.vocab == theirs.get_vocab() and ours.added_tokens_encoder == theirs.added_tokens_encoder
    assert ours.encode('<cat-toy>')[1:-1] == [574]
    for text in ('A <CAT-TOY>, a <dog-toy>', '<|EndOfText|>!'): assert same(ours, theirs, text)


def test_old_file_of_added_tokens_that_are_special(learned, tmp_path):
    "What has a role or is listed as special is recognized only as it is written"
    config = dict(flavours()['sd1'][0], pad_token='<Pad>', additional_special_tokens=['<Pause>'])
    folder = write(tmp_path/'old', learned, config)
    (folder/'added_tokens.json').write_text(json.dumps({'<Pad>': 574, '<Pause>': 575, '<Cat>': 576}))
    ours, theirs = read(folder)
    assert ours.added == {'<Pause>': True, '<Cat>': False} and ours.pad_token_id == theirs.pad_token_id == 574
    for text in ('a <Pad> <pad>', 'a <Pause> <pause>', 'a <Cat> <cat>'): assert same(ours, theirs, text), text


def test_special_tokens_without_a_role(learned, tmp_path):
    "Recognized only as they are written, and skipped"
    theirs = transformers.CLIPTokenizer(learned.vocab, learned.merges)
    theirs.add_special_tokens({'additional_special_tokens': ['<Pause>', 'red</w>']})
    theirs.save_pretrained(tmp_path/'b')
    ours = CLIPTokenizer.from_pretrained(tmp_path/'b')
    assert ours.added == {'<Pause>': True, 'red</w>': True} and not ours.normalized
    again = CLIPTokenizer.from_pretrained(ours.save_pretrained(tmp_path/'a'))
    theirs_again = transformers.CLIPTokenizer.from_pretrained(tmp_path/'a')
    for text in ('a <Pause> red</w>, a <pause> RED</w>', 'red'):
        assert same(ours, theirs, text) and same(again, theirs, text) and same(ours, theirs_again, text)
    listed = dict(flavours()['sd1'][0], additional_special_tokens=['red</w>'])  # in the vocabulary, but not described
    folder = write(tmp_path/'listed', learned, listed)
    ours, theirs = read(folder)
    assert same(ours, theirs, 'red</w> red') and ours.added == {'red</w>': True}


def test_own_tokens_after_a_gap(learned):
    "New ids are the next after the greatest, also where some are left out"
    vocab = {t: i + 100*(t == END) for t, i in learned.vocab.items()}
    gap = CLIPTokenizer(vocab, learned.merges)
    assert gap.add_tokens(['<a>', '<b>']) == 2 and gap.encode('<b><a>')[1:-1] == [675, 674]
    assert gap.decode([675]) == '<b>'


@pytest.mark.parametrize('tokens, message', [
    (7, 'texts are a string'), (['<a>', None], 'texts are a string'), ([], 'an empty batch'), ('<\ud800>', 'surrogate'),
    (['<A>', '<a>'], "as '<A>' does"), ('<Cat-Toy>', "as '<Cat-Toy>' does"), ('<|EndOfText|>', 'in small letters too')])
def test_tokens_that_cannot_be_added(learned, tokens, message):
    ours = CLIPTokenizer(learned.vocab, learned.merges, normalized=[END])
    ours.add_tokens('<cat-toy>')
    with pytest.raises(ValueError, match=message): ours.add_tokens(tokens)
    assert len(ours) == len(learned) + 1 and ours.added == {'<cat-toy>': False}


def test_added_tokens_that_cannot_be_read(learned, tmp_path):
    config, table = flavours()['sd1']
    for i, (more, added, message) in enumerate([
            ({}, {'<cat-toy>': 573}, 'an id of its own'), ({}, {'seven</w>': 574}, "give 'seven</w>' two ids"),
            ({'extra_special_tokens': ['<x>']}, {}, "lacks '<x>'"), ({}, {'<cat-toy>': 'x'}, 'invalid literal'),
            ({'pad_token': dict(token('!'), single_word=True)}, {}, "single_word.* got '!'"),
            ({'added_tokens_decoder': {'574': dict(token('<a>'), single_word=True)}}, {}, "single_word.* got '<a>'")]):
        folder = write(tmp_path/str(i), learned, {**config, **more})
        (folder/'added_tokens.json').write_text(json.dumps(added))
        with pytest.raises(ValueError, match=message): CLIPTokenizer.from_pretrained(folder)


# learning

def test_vocabulary_is_as_clips(learned):
    ids = sorted(learned.vocab, key=learned.vocab.get)
    assert list(learned.vocab.values()) == list(range(len(ids)))
    assert ids[:2] == ['!', '"'] and ids[256] == '!</w>' and ids[-2:] == [START, END]
    assert ids[512:-2] == [a + b for a, b in learned.merges]
    assert len(learned) == 514 + 60
    for text in ('sette', 'a BOLD red 7', 'café 😀'): assert learned.decode(learned.encode(text), True) == text.lower()


def test_a_tie_is_decided_by_the_alphabet():
    for captions in (['cd', 'ab'], ['ab', 'cd'], ['cd ab'], ['ab cd']):
        assert learn_merges(captions, 2) == [('a', 'b</w>'), ('c', 'd</w>')]


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
    for call in (learned, learned.encode, learned.tokenize, lambda t: learn_merges([t], 3)):
        for text in ('\ud800', 'red \udfff', '\ud83d\ude00'):  # two halves are no whole in Python either
            with pytest.raises(ValueError, match='half of one .a lone surrogate. in') as e: call(text)
            assert type(e.value) is ValueError


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
    ('vocab.json', lambda t: t.replace('endoftext', 'end'), 'an id of its own'),
    ('vocab.json', lambda t: t.replace('"seven</w>"', '"s8</w>"'), 'merge .* token of the vocabulary'),
    ('merges.txt', lambda t: t.replace('\n', '\ne\n', 1), "got 'e'"),
    ('merges.txt', lambda t: t.replace('\n', '\ne n x\n', 1), "got 'e n x'"),
    ('merges.txt', lambda t: '\n'.join(t.split('\n')[::-1]), 'merge 1 must'),
    ('merges.txt', lambda t: t + 'q zebra\n', "got 'q zebra'"),
    ('merges.txt', lambda t: '\n'.join(t.split('\n')[:-2]), 'none of the 59 merges makes'),
    ('merges.txt', lambda t: '#version: 0.2', 'none of the 0 merges makes'),
    ('vocab.json', lambda t: t.replace('"!": 0', '"!": 0, "zebra": 600'), "makes 'zebra'"),
    ('merges.txt', lambda t: t.encode() + b'\xff', 'undamaged .* UnicodeDecodeError'),
    ('merges.txt', lambda t: None, 'undamaged vocab.json and merges.txt, or tokenizer.json'),
    ('vocab.json', lambda t: None, 'undamaged vocab.json and merges.txt, or tokenizer.json'),
    ('tokenizer_config.json', lambda t: '{', 'not valid JSON'),
    ('tokenizer_config.json', lambda t: '{"model_max_length": "long"}', 'undamaged'),
    ('tokenizer_config.json', lambda t: '{"pad_token": {"text": 1}}', 'undamaged'),
    ('tokenizer_config.json', lambda t: '{"pad_token": "<pad>"}', "574 tokens lacks '<pad>'"),
    ('tokenizer_config.json', lambda t: '{"added_tokens_decoder": [7]}', 'undamaged'),
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
