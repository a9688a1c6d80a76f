package policy

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Limits on a policy file. A person writes it; beyond them something else is being fed in.
const (
	maxSourceBytes = 1 << 20
	maxRules       = 1000
	// A name appears in errors and in tables.
	maxNameRunes = 128
	// A reason is one sentence.
	maxReasonRunes = 1000
)

// version is the only version of the file format.
const version = "1"

// Answers of a rule and of the default.
const (
	answerContainer = string(spec.IsolationContainer)
	answerVM        = string(spec.IsolationVM)
	answerDeny      = "deny"
)

// What a rule says of system call filters; nothing said is seccompDefault.
const seccompAny = "any"

// Names that stand in a Decision for no rule.
const (
	RuleDefault  = "default"
	RuleNoPolicy = "no-policy"
)

// Error is one mistake in a policy file.
type Error struct {
	File string
	// Counted from 1; zero when the mistake is the file's as a whole.
	Line, Column int
	Message      string
}

func (e *Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Message)
	}
	if e.Column == 0 {
		return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Message)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
}

// Errors are all mistakes found in a policy file, in the order of the file, one a line.
type Errors []*Error

func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, m := range e {
		lines[i] = m.Error()
	}
	return strings.Join(lines, "\n")
}

// Load reads a policy. filename only appears in errors, which are Errors. Whatever is not understood is an error: a rule
// that was mistyped must never be a rule that is not there.
func Load(source []byte, filename string) (*Policy, error) {
	l := &loader{file: filename, lines: lineBreak.Split(string(source), -1)}
	p := l.load(source)
	if len(l.errors) > 0 {
		slices.SortStableFunc(l.errors, func(a, b *Error) int {
			return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		return nil, l.errors
	}
	return p, nil
}

type loader struct {
	file   string
	lines  []string
	errors Errors
}

func (l *loader) fail(line, column int, format string, args ...any) {
	l.errors = append(l.errors, &Error{File: l.file, Line: line, Column: column, Message: fmt.Sprintf(format, args...)})
}

// failAt reports a mistake where n stands.
func (l *loader) failAt(n *yaml.Node, format string, args ...any) {
	l.fail(n.Line, n.Column, format, args...)
}

func (l *loader) load(source []byte) *Policy {
	if len(source) > maxSourceBytes {
		l.fail(0, 0, "the file has %d bytes; a policy may have %d", len(source), maxSourceBytes)
		return nil
	}
	if !utf8.Valid(source) {
		l.fail(0, 0, "the file is not UTF-8 text")
		return nil
	}
	root := l.parse(source)
	if root == nil {
		return nil
	}
	digest := sha256.Sum256(source)
	p := &Policy{
		loaded: true, fallback: answerVM,
		source: bytes.Clone(source), digest: "sha256:" + hex.EncodeToString(digest[:]),
	}
	fields := l.mapping(root, "the policy", "version", "default", "rules")
	l.version(root, fields["version"])
	if n := fields["default"]; n != nil {
		p.fallback = l.choice(n, "default", answerVM, answerContainer, answerDeny)
	}
	if n := fields["rules"]; n != nil {
		p.rules = l.rules(n)
	}
	return p
}

// lineBreak is what YAML takes for the end of a line, and so what its line numbers count.
var lineBreak = regexp.MustCompile("\r\n|[\n\r\u0085\u2028\u2029]")

// yamlLine is how yaml.v3 says where a syntax error is.
var yamlLine = regexp.MustCompile(`^yaml: line (\d+): (.*)$`)

// parse gives the root of the only document of a file.
func (l *loader) parse(source []byte) *yaml.Node {
	decoder := yaml.NewDecoder(bytes.NewReader(source))
	var document, second yaml.Node
	err := decoder.Decode(&document)
	switch {
	case errors.Is(err, io.EOF) || err == nil && len(document.Content) == 0:
		l.fail(0, 0, "the file is empty; a policy starts with \"version: 1\"")
		return nil
	case err != nil:
		l.syntax(err)
		return nil
	}
	switch err := decoder.Decode(&second); {
	case err == nil:
		l.fail(second.Line, second.Column, "a second document; a policy is one")
		return nil
	case !errors.Is(err, io.EOF):
		l.syntax(err)
		return nil
	}
	return document.Content[0]
}

func (l *loader) syntax(err error) {
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		line, _ := strconv.Atoi(m[1]) // digits, by the expression; 0 on overflow means the whole file
		l.fail(line, 0, "not YAML: %s", m[2])
		return
	}
	l.fail(0, 0, "not YAML: %s", strings.TrimPrefix(err.Error(), "yaml: "))
}

// mapping gives the values of a mapping by key. Every key must be known, and be there once.
func (l *loader) mapping(n *yaml.Node, what string, known ...string) map[string]*yaml.Node {
	fields := map[string]*yaml.Node{}
	if n.Kind != yaml.MappingNode {
		l.failAt(n, "%s must be a mapping with the fields %s", what, strings.Join(known, ", "))
		return fields
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		switch {
		case key.Kind != yaml.ScalarNode || !slices.Contains(known, key.Value):
			l.failAt(key, "unknown field %q in %s; it has %s", key.Value, what, strings.Join(known, ", "))
		case fields[key.Value] != nil:
			l.failAt(key, "field %q is given twice in %s", key.Value, what)
		case value.Kind == yaml.AliasNode:
			l.failAt(value, "field %q: aliases are not understood; write the value out", key.Value)
		default:
			fields[key.Value] = value
		}
	}
	return fields
}

func (l *loader) version(root, n *yaml.Node) {
	if n == nil {
		if root.Kind == yaml.MappingNode {
			l.failAt(root, "field \"version\" is missing; this sandboxd understands \"version: %s\"", version)
		}
		return
	}
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" || n.Value != version {
		l.failAt(n, "version %q is unknown; this sandboxd understands \"version: %s\"", n.Value, version)
	}
}

// choice gives a scalar that must be one of some words; "" after an error.
func (l *loader) choice(n *yaml.Node, field string, words ...string) string {
	if n.Kind != yaml.ScalarNode || !slices.Contains(words, n.Value) {
		l.failAt(n, "%s must be one of %s, not %q", field, strings.Join(words, ", "), n.Value)
		return ""
	}
	return n.Value
}

// text gives a scalar of one line.
func (l *loader) text(n *yaml.Node, field string, maxRunes int) string {
	s := strings.TrimSpace(n.Value)
	switch {
	case n.Kind != yaml.ScalarNode || n.Tag == "!!null" || s == "":
		l.failAt(n, "%s must be a text", field)
	case utf8.RuneCountInString(s) > maxRunes:
		l.failAt(n, "%s has more than %d characters", field, maxRunes)
	case strings.ContainsFunc(s, unicode.IsControl):
		l.failAt(n, "%s must be one line without control characters", field)
	default:
		return s
	}
	return ""
}

func (l *loader) rules(n *yaml.Node) []rule {
	if n.Kind != yaml.SequenceNode {
		l.failAt(n, "rules must be a list")
		return nil
	}
	if len(n.Content) > maxRules {
		l.failAt(n, "%d rules; a policy may have %d", len(n.Content), maxRules)
		return nil
	}
	env, err := newEnvironment()
	if err != nil {
		l.fail(0, 0, "cannot make the expression language: %v", err)
		return nil
	}
	rules := make([]rule, 0, len(n.Content))
	lineOf := map[string]int{}
	for i, item := range n.Content {
		r := l.rule(env, item, fmt.Sprintf("rule %d", i+1))
		if first := lineOf[r.Name]; r.Name != "" && first != 0 {
			l.failAt(item, "rule %q has the name of the rule in line %d", r.Name, first)
		}
		lineOf[r.Name] = item.Line
		rules = append(rules, r)
	}
	return rules
}

func (l *loader) rule(env *environment, n *yaml.Node, what string) rule {
	var r rule
	fields := l.mapping(n, what, "name", "when", "isolation", "deny", "seccomp", "reason")
	if n.Kind != yaml.MappingNode {
		return r
	}
	if f := fields["name"]; f == nil {
		l.failAt(n, "%s has no name", what)
	} else {
		r.Name = l.text(f, "name", maxNameRunes)
		if r.Name == RuleDefault || r.Name == RuleNoPolicy {
			l.failAt(f, "a rule cannot be called %q: that stands for no rule", r.Name)
		}
	}
	if f := fields["reason"]; f != nil {
		r.Reason = l.text(f, "reason", maxReasonRunes)
	}
	r.Answer = l.answer(n, what, fields["isolation"], fields["deny"])
	if f := fields["seccomp"]; f != nil {
		if r.Answer == answerDeny {
			l.failAt(f, "%s denies, and so grants no seccomp profile", what)
		}
		if l.choice(f, "seccomp", seccompDefault, seccompAny) == seccompAny {
			r.Seccomp = seccompAny
		}
	}
	switch f := fields["when"]; {
	case f == nil:
		l.failAt(n, "%s has no condition: give \"when\" (\"when: true\" matches always)", what)
	case f.Kind != yaml.ScalarNode || f.Tag == "!!null" || strings.TrimSpace(f.Value) == "":
		l.failAt(f, "when must be a condition")
	default:
		r.When = strings.TrimSpace(f.Value)
		r.condition = l.condition(env, f)
	}
	return r
}

// answer is what a rule says: exactly one of isolation and deny.
func (l *loader) answer(n *yaml.Node, what string, isolation, deny *yaml.Node) string {
	switch {
	case isolation != nil && deny != nil:
		l.failAt(deny, "%s has both isolation and deny", what)
	case isolation != nil:
		return l.choice(isolation, "isolation", answerContainer, answerVM)
	case deny == nil:
		l.failAt(n, "%s has no answer: give \"isolation: container\", \"isolation: vm\" or \"deny: true\"", what)
	case deny.Kind != yaml.ScalarNode || deny.Tag != "!!bool" || deny.Value != "true":
		l.failAt(deny, "deny must be true, or not be there")
	default:
		return answerDeny
	}
	return ""
}

// condition compiles a rule's expression and says where in the file its mistakes are.
func (l *loader) condition(env *environment, n *yaml.Node) *condition {
	c, mistakes := env.compile(n.Value)
	for _, m := range mistakes {
		line, column := l.position(n, m.offset)
		l.fail(line, column, "when: %s", m.message)
	}
	return c
}
