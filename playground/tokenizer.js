// Texts to token ids, as lesson 08b's CLIPTokenizer does it, token for token.

const START = '<|startoftext|>', END = '<|endoftext|>'
const PIECES = /(<\|)(startoftext|endoftext)(\|>)|('s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+)/gu

// Each of the 256 bytes as a letter: its own where that can be printed, else one from 256 on
const LETTERS = []
for (let byte = 0, next = 256; byte < 256; byte++) {
  const printed = byte > 32 && byte < 127 || byte > 160 && byte != 173
  LETTERS.push(String.fromCharCode(printed ? byte : next++))
}

// Accents joined to their letters, white space of any kind a single space, small letters
const normalize = text => Array.from(text.normalize('NFC').replace(/\p{White_Space}+/gu, ' '), c => c.toLowerCase()).join('')

export class Tokenizer {
  constructor({ vocab, merges, model_max_length }) {
    Object.assign(this, { vocab, length: model_max_length, start: vocab[START], end: vocab[END] })
    this.ranks = new Map(merges.map((pair, rank) => [pair, rank]))  // 'a b' -> 0 if it was learned first
  }

  // The tokens of a word: of all pairs of neighbours, the one that was learned first is joined first
  merge(word) {
    let tokens = Array.from(new TextEncoder().encode(word), byte => LETTERS[byte])
    tokens[tokens.length - 1] += '</w>'
    for (;;) {
      const ranks = tokens.slice(1).map((token, i) => this.ranks.get(`${tokens[i]} ${token}`) ?? Infinity)
      const best = Math.min(...ranks)
      if (best == Infinity) return tokens
      const joined = []
      for (let i = 0; i < tokens.length; i++) joined.push(ranks[i] == best ? tokens[i] + tokens[++i] : tokens[i])
      tokens = joined
    }
  }

  // The tokens of a text; start and end stay whole where somebody writes them
  tokenize(text) {
    return text.split(/(<\|startoftext\|>|<\|endoftext\|>)/).flatMap((part, i) => i % 2 ? [part] :
      Array.from(normalize(part).matchAll(PIECES), ([, ...groups]) => groups.filter(Boolean)).flat().flatMap(w => this.merge(w)))
  }

  // The same as ids
  encode(text) { return this.tokenize(text).map(token => this.vocab[token] ?? this.end) }
}

// Pieces of a prompt, and how much each counts: '(words:1.4)' 1.4 times
export function parseWeights(prompt) {
  const parts = prompt.split(/\(([^():]*):(\d+\.?\d*|\.\d+)\)/), pieces = []
  for (let i = 0; i < parts.length; i += 3) pieces.push([parts[i], 1], [parts[i + 1] ?? '', Number(parts[i + 2] ?? 1)])
  return pieces.filter(([text]) => text)
}

// As many rows of ids as a prompt needs, each with start, end and padding, and the weight of each id
export function tokenRows(tokenizer, prompt) {
  const room = tokenizer.length - 2, { start, end } = tokenizer
  const known = parseWeights(prompt).flatMap(([text, weight]) => tokenizer.encode(text).map(id => [id, weight]))
  const rows = []
  do {
    const row = known.splice(0, room), padding = Array(room - row.length).fill([end, 1])
    rows.push([[start, 1], ...row, [end, 1], ...padding])
  } while (known.length)
  return { ids: rows.map(row => row.map(([id]) => id)), weights: rows.map(row => row.map(([, weight]) => weight)) }
}
