package console

import (
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// Source is one of those who speak: an io.Writer that cuts what is written into lines. Its methods may be called at once.
type Source struct {
	log    *Log
	prefix string
	seen   func(line string)
	ignore string

	mu      sync.Mutex
	partial []byte // a line whose end has not come; guarded by mu
	// The first and the last of what was said, joined by blanks. Guarded by mu.
	head, tail string
}

// Source is one that speaks into the log, each line after prefix. seen, which may be nil, is called with each line as it
// is stored, without the prefix.
func (l *Log) Source(prefix string, seen func(line string)) *Source {
	return &Source{log: l, prefix: prefix, seen: seen}
}

// Ignoring has s drop every line with part in it, for what is said each time and helps nobody.
func (s *Source) Ignoring(part string) *Source {
	s.ignore = part
	return s
}

// Write implements io.Writer. It takes everything, also after an error, which says that something was not kept.
func (s *Source) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for _, c := range b {
		if c != '\n' {
			s.partial = append(s.partial, c)
		}
		if c == '\n' || len(s.partial) >= maxLine {
			if e := s.endLineLocked(); err == nil {
				err = e
			}
		}
	}
	return len(b), err
}

// Flush ends a line that was begun.
func (s *Source) Flush() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.endLineLocked()
}

func (s *Source) endLineLocked() error {
	text := strings.TrimRight(escape(s.partial), " ")
	s.partial = s.partial[:0]
	if text == "" || s.ignore != "" && strings.Contains(text, s.ignore) {
		return nil
	}
	if s.seen != nil {
		s.seen(text)
	}
	s.rememberLocked(text)
	return s.log.write(time.Now().UTC().Format(time.RFC3339Nano) + " " + s.prefix + text + "\n")
}

func (s *Source) rememberLocked(text string) {
	if len(s.head) < maxQuote {
		s.head += text + " "
		if len(s.head) <= maxQuote {
			return
		}
		text, s.head = s.head[maxQuote:], s.head[:maxQuote]
	} else {
		text += " "
	}
	s.tail += text
	if cut := len(s.tail) - maxQuote; cut > 0 {
		s.tail = "…" + s.tail[cut:]
	}
}

// Quote is what the source said, in one line: its beginning and its end, if it was much.
func (s *Source) Quote() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.ToValidUTF8(strings.TrimSpace(s.head+s.tail), "")
}

// escape makes text of what may be anything: a carriage return goes, a tab is a blank, what is not printable is \x and its
// bytes in hexadecimal, and a backslash is doubled so that nobody can pretend one.
func escape(b []byte) string {
	var out strings.Builder
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		switch {
		case r == '\r' || r == 0:
		case r == '\t':
			out.WriteByte(' ')
		case r == '\\':
			out.WriteString(`\\`)
		case r == utf8.RuneError || !unicode.IsPrint(r):
			for _, c := range b[:n] {
				fmt.Fprintf(&out, `\x%02x`, c)
			}
		default:
			out.Write(b[:n])
		}
		b = b[n:]
	}
	return out.String()
}
