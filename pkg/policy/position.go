package policy

import (
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// position finds where in the file the rune of a scalar's value with the given index stands. YAML folds lines, strips
// indentation and undoes quotes, but apart from white space it keeps every character and their order: so it is enough to
// count those. An index past the end gives the last character's place; where the two cannot be matched, the scalar's.
func (l *loader) position(n *yaml.Node, index int) (line, column int) {
	// How many characters, white space apart, come before the one looked for; and what to step back to at the end.
	before, total := 0, 0
	for i, r := range []rune(n.Value) {
		if unicode.IsSpace(r) {
			continue
		}
		if i < index {
			before++
		}
		total++
	}
	before = min(before, total-1)
	for c := range l.characters(n) {
		if unicode.IsSpace(c.value) {
			continue
		}
		if before == 0 {
			return c.line, c.column
		}
		before--
	}
	return n.Line, n.Column
}

// character is one character of a scalar's value and where in the file it stands. The column counts characters from 1, as
// yaml.Node's and editors' do.
type character struct {
	value        rune
	line, column int
}

// characters goes through a scalar as it is written.
func (l *loader) characters(n *yaml.Node) func(yield func(character) bool) {
	line, column := n.Line, n.Column
	if n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		// The text starts below the line with the | or >.
		line, column = line+1, 1
	} else if n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) != 0 {
		column++
	}
	return func(yield func(character) bool) {
		for ; line >= 1 && line <= len(l.lines); line, column = line+1, 1 {
			text := []rune(l.lines[line-1])
			for i := column - 1; i < len(text); i++ {
				c := character{text[i], line, i + 1}
				switch {
				case n.Style&yaml.SingleQuotedStyle != 0 && text[i] == '\'':
					i++ // a quote is written twice
				case n.Style&yaml.DoubleQuotedStyle != 0 && text[i] == '\\':
					var ends int
					c.value, ends = unescape(text[i:])
					i += ends - 1
				}
				if !yield(c) {
					return
				}
			}
		}
	}
}

// escapes are those of double-quoted YAML that stand for white space; most others stand for themselves.
var escapes = map[rune]rune{'n': '\n', 't': '\t', 'r': '\r', ' ': ' ', 'v': '\v', 'f': '\f', 'N': '\u0085', '_': '\u00a0', 'L': '\u2028', 'P': '\u2029'}

// unescape gives the character that the escape at the start of text stands for, as far as telling white space from the
// rest needs, and how long the escape is.
func unescape(text []rune) (rune, int) {
	if len(text) == 1 {
		return ' ', 1 // the line goes on below
	}
	if digits := map[rune]int{'x': 2, 'u': 4, 'U': 8}[text[1]]; digits > 0 {
		var r rune
		for _, d := range text[2:min(len(text), 2+digits)] {
			r = r<<4 | rune(strings.IndexRune("0123456789abcdef", unicode.ToLower(d)))
		}
		return r, 2 + digits
	}
	if r, known := escapes[text[1]]; known {
		return r, 2
	}
	return text[1], 2
}
