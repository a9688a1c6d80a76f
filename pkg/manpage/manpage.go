// Package manpage writes manual pages out of what a program says of itself, so that the two never differ.
package manpage

import (
	"fmt"
	"io"
	"strings"
	"unicode"

	"github.com/spf13/pflag"
)

// Page is one manual page. Text is plain: lines as a terminal shows them.
type Page struct {
	// Name of the page, such as sandboxctl-run.
	Name string
	// Section of the manual: 1 for commands, 8 for daemons.
	Section int
	// One line, without a full stop.
	Short string
	// The synopsis, one line each.
	Usage []string
	// Paragraphs, separated by empty lines; empty for none.
	Long string
	// Each with a heading of its own; those that are hidden or have no flags are left out.
	Flags []FlagGroup
	// Shown as it is.
	Example string
	// Further sections.
	More []Text
	// Other pages, such as sandboxctl(1).
	SeeAlso []string
}

// FlagGroup is a section of flags.
type FlagGroup struct {
	Heading string
	Flags   *pflag.FlagSet
}

// Text is a section of paragraphs.
type Text struct{ Heading, Body string }

// Write writes the page in man(7)'s macros. It has no date: the same program makes the same bytes.
func (p Page) Write(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, ".TH %s %d \"\" sandboxd \"sandboxd manual\"\n.nh\n.ad l\n", quoted(strings.ToUpper(p.Name)), p.Section)
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", text(p.Name), text(lowerFirst(p.Short)))
	b.WriteString(".SH SYNOPSIS\n")
	for i, line := range p.Usage {
		if i > 0 {
			b.WriteString(".br\n")
		}
		fmt.Fprintf(&b, "%s\n", text(line))
	}
	if p.Long != "" {
		b.WriteString(".SH DESCRIPTION\n")
		paragraphs(&b, p.Long)
	}
	for _, g := range p.Flags {
		if g.Flags == nil || !g.Flags.HasAvailableFlags() {
			continue
		}
		fmt.Fprintf(&b, ".SH %s\n", quoted(strings.ToUpper(g.Heading)))
		g.Flags.VisitAll(func(f *pflag.Flag) { flag(&b, f) })
	}
	if p.Example != "" {
		b.WriteString(".SH EXAMPLES\n.nf\n")
		for line := range strings.Lines(p.Example) {
			b.WriteString(text(strings.TrimRight(line, "\n")) + "\n")
		}
		b.WriteString(".fi\n")
	}
	for _, m := range p.More {
		fmt.Fprintf(&b, ".SH %s\n", quoted(strings.ToUpper(m.Heading)))
		paragraphs(&b, m.Body)
	}
	if len(p.SeeAlso) > 0 {
		fmt.Fprintf(&b, ".SH SEE ALSO\n%s\n", text(strings.Join(p.SeeAlso, ", ")))
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("cannot write manual page %s: %w", p.Name, err)
	}
	return nil
}

func flag(b *strings.Builder, f *pflag.Flag) {
	if f.Hidden {
		return
	}
	kind, usage := pflag.UnquoteUsage(f)
	b.WriteString(".TP\n")
	if f.Shorthand != "" {
		fmt.Fprintf(b, "\\fB%s\\fP, ", text("-"+f.Shorthand))
	}
	fmt.Fprintf(b, "\\fB%s\\fP", text("--"+f.Name))
	if kind != "" {
		fmt.Fprintf(b, " \\fI%s\\fP", text(kind))
	}
	b.WriteString("\n" + text(usage))
	switch f.DefValue {
	case "", "false", "0", "[]", "0s":
	default:
		b.WriteString(text(" (default " + f.DefValue + ")"))
	}
	b.WriteString("\n")
}

// paragraphs fills lines; those that begin with a space are shown as they are.
func paragraphs(b *strings.Builder, body string) {
	for i, paragraph := range strings.Split(strings.Trim(body, "\n"), "\n\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		shown := strings.HasPrefix(paragraph, " ")
		if shown {
			b.WriteString(".nf\n")
		}
		for line := range strings.Lines(paragraph) {
			b.WriteString(text(strings.TrimRight(line, "\n")) + "\n")
		}
		if shown {
			b.WriteString(".fi\n")
		}
	}
}

// text has roff show s as it is: a leading dot or quote would be a request, a hyphen would become another character.
func text(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

func quoted(s string) string { return `"` + strings.ReplaceAll(text(s), `"`, `""`) + `"` }

// lowerFirst is what whatis(1) shows; names such as OCI stay.
func lowerFirst(s string) string {
	r := []rune(s)
	if len(r) > 1 && !unicode.IsUpper(r[1]) {
		r[0] = unicode.ToLower(r[0])
	}
	return string(r)
}
