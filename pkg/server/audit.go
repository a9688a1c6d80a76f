package server

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"go.uber.org/zap"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/audit"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// The audit log has a line of every call whose row in methods says audited, written before the caller is answered. A
// stream may last for days, so it has one when it begins and one when it ends. What of the request is in it says the column
// audited of fields; the rest is left out, for it may be secret: an environment's values, arguments, bytes.

// reasonAuditUnavailable: the call would change something and could not be audited.
const reasonAuditUnavailable = "AUDIT_UNAVAILABLE"

// auditBounds say how much of what a caller chose goes into a line, so that it stays below audit.MaxLineBytes. Nobody shall be
// able to hide one part of a request behind the size of another: what is too large by the first is written by the second.
var auditBounds = []auditBound{{stringBytes: 256, items: 64}, {stringBytes: 48, items: 64}}

type auditBound struct{ stringBytes, items int }

// auditRequestBytes is what is left for the request in a line.
const auditRequestBytes = audit.MaxLineBytes - 8<<10

// auditLine is a line of the audit log; docs/access.md describes it.
type auditLine struct {
	Time time.Time `json:"time"`
	// The same in the lines of one stream.
	Call string `json:"call"`
	// "begin" and "end" of a stream; other calls have one line.
	Part     string         `json:"part,omitempty"`
	Who      auditWho       `json:"who"`
	Method   string         `json:"method"`
	Workload string         `json:"workload,omitempty"`
	Image    string         `json:"image,omitempty"`
	Request  map[string]any `json:"request,omitempty"`
	// "allowed", "denied" by a role or the policy, "refused" for another reason before that was decided.
	Decision string `json:"decision"`
	// What decided: the role that allowed, or the role's key or the policy's rule that denied.
	Rule string `json:"rule,omitempty"`
	// How it ended; absent at the beginning of a stream.
	Code   string `json:"code,omitempty"`
	Reason string `json:"reason,omitempty"`
	TookMS *int64 `json:"took_ms,omitempty"`
}

type auditWho struct {
	Transport string   `json:"transport"`
	UID       *uint32  `json:"uid,omitempty"`
	GID       *uint32  `json:"gid,omitempty"`
	PID       int32    `json:"pid,omitempty"`
	Names     []string `json:"names,omitempty"`
	Peer      string   `json:"peer,omitempty"`
}

// takesAway are verbs that end or remove something. They go on when the audit log cannot be written: who has to stop a
// workload, or to make room on a full disk, must be able to.
func takesAway(method string) bool {
	switch methods[method].verb {
	case access.Delete, access.ImagesRemove, access.TemplatesRemove:
		return true
	}
	name := method[strings.LastIndexByte(method, '/')+1:]
	return name == "StopWorkload" || name == "KillWorkload" || name == "PauseWorkload" || name == "DeleteSnapshot"
}

// auditCall is the part of one call in the audit log. Nil for calls that are not audited.
type auditCall struct {
	log *audit.Log
	// What a call without streams came with; nil otherwise.
	request proto.Message
	stream  bool
	began   time.Time

	mu   sync.Mutex // guards what follows: a handler's goroutine may outlive the call
	line auditLine
	// It has room in the log, taken by Begin.
	room bool
	over bool
}

type auditKey struct{}

func auditOf(ctx context.Context) *auditCall {
	a, _ := ctx.Value(auditKey{}).(*auditCall)
	return a
}

// beginAudit is nil if the method, or this daemon, is not audited.
func (s *Server) beginAudit(ctx context.Context, method string, request any) *auditCall {
	if s.Audit == nil || !methods[method].audited {
		return nil
	}
	now := time.Now()
	m, unary := request.(proto.Message)
	return &auditCall{log: s.Audit, request: m, stream: !unary, began: now, line: auditLine{
		Time: now.UTC(), Call: rand.Text()[:16], Who: auditWhoOf(ctx), Method: method, Decision: "refused",
	}}
}

// auditRoles notes that the roles were read: at the start, or again.
func (s *Server) auditRoles() {
	if s.Audit == nil {
		return
	}
	line := auditLine{Time: time.Now().UTC(), Call: rand.Text()[:16], Who: auditWho{Transport: "daemon"}, Method: "read access file", Decision: "allowed", Code: codes.OK.String()}
	if err := s.Audit.Write(line); err != nil {
		s.Log.Error("a change of the roles is missing in the audit log", zap.Error(err))
	}
}

func auditWhoOf(ctx context.Context) auditWho {
	caller, identified := callerOf(ctx)
	who := auditWho{Transport: "unix"}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil && p.Addr.Network() == "tcp" {
		who.Transport, who.Peer = "tls", p.Addr.String()
	}
	if !identified {
		who.Transport = "unknown"
		return who
	}
	if len(caller.Names) > 0 {
		for _, n := range caller.Names[:min(len(caller.Names), 16)] {
			who.Names = append(who.Names, shortened(n))
		}
		return who
	}
	who.UID, who.GID, who.PID = &caller.UID, &caller.GID, caller.PID
	return who
}

// admitted notes what the call asks for, and that it may. An error ends the call: it cannot be audited.
func (s *Server) auditAdmitted(ctx context.Context, method string, m proto.Message, denied error) error {
	a := auditOf(ctx)
	if a == nil {
		return denied
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.line.Request = auditedRequest(m)
	a.line.Workload = s.auditedWorkload(method, m)
	if denied != nil {
		return denied
	}
	a.line.Decision = "allowed"
	if p := permitOf(ctx); p.role != nil {
		a.line.Rule = p.role.Name
	}
	if err := a.log.Begin(); err != nil {
		s.Log.Error("cannot audit a call", zap.String("method", method), zap.Error(err))
		if takesAway(method) {
			return nil
		}
		a.line.Decision = "refused"
		return spec.Errorf(spec.KindUnavailable, "the audit log cannot be written, so nothing may be changed but stopped and removed: %w; make room on the disk of the log", err).WithReason(reasonAuditUnavailable)
	}
	if !a.stream {
		a.room = true
		return nil
	}
	line := a.line
	line.Part = "begin"
	return a.log.End(line)
}

// auditedWorkload is the full id of the workload that a request names, or what it says if there is none.
func (s *Server) auditedWorkload(method string, m proto.Message) string {
	if methods[method].on != onWorkload {
		return ""
	}
	in, id := idField(m.ProtoReflect())
	if id == nil {
		return ""
	}
	ref := in.Get(id).String()
	if w, err := s.Workloads.Get(ref); err == nil {
		return w.ID
	}
	return shortened(ref)
}

// answered notes what a call made.
func (a *auditCall) answered(m any) {
	answer, ok := m.(proto.Message)
	if a == nil || !ok {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return
	}
	r := answer.ProtoReflect()
	if id := textIn(r, "workload", "id"); id != "" {
		a.line.Workload = id
	}
	if digest := textIn(r, "image", "digest"); digest != "" {
		a.line.Image = digest
	}
}

// textIn is a string in a message in a message, "" if either is not there.
func textIn(m protoreflect.Message, outer, inner protoreflect.Name) string {
	f := m.Descriptor().Fields().ByName(outer)
	if f == nil || f.Message() == nil || f.IsMap() || f.IsList() || !m.Has(f) {
		return ""
	}
	within := m.Get(f).Message()
	if f = within.Descriptor().Fields().ByName(inner); f == nil || f.Kind() != protoreflect.StringKind {
		return ""
	}
	return within.Get(f).String()
}

// names notes the workload that a call made.
func (a *auditCall) names(workload string) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.over {
		a.line.Workload = workload
	}
}

// step writes a line of something that a call does besides: as the call would have that does only this. The call may be over.
func (a *auditCall) step(log *zap.Logger, method, workload string, answer error, took time.Duration) {
	if a == nil {
		return
	}
	a.mu.Lock()
	line := a.line
	a.mu.Unlock()
	ms := took.Milliseconds()
	line.Time, line.Part, line.Method, line.Workload, line.Request = time.Now().UTC(), "", method, workload, nil
	line.Code, line.Reason, line.TookMS = status.Code(answer).String(), "", &ms
	if info := errorInfo(answer); info != nil {
		line.Reason = info.GetReason()
	}
	if err := a.log.Write(line); err != nil {
		log.Error("a part of a call is missing in the audit log", zap.String("method", method), zap.String("workload", workload),
			zap.String("code", line.Code), zap.Error(err))
	}
}

// AuditRemoved notes the removal of a workload that an earlier daemon was asked to remove at its end, for who created it.
func AuditRemoved(trail *audit.Log, log *zap.Logger, w workload.Workload, err error) {
	if trail == nil {
		return
	}
	answer := toStatus(context.Background(), err)
	line := auditLine{
		Time: time.Now().UTC(), Call: rand.Text()[:16], Who: auditWho{Transport: "daemon"}, Method: sandboxdv1.WorkloadService_DeleteWorkload_FullMethodName,
		Workload: w.ID, Decision: "allowed", Code: status.Code(answer).String(),
	}
	if err := trail.Write(line); err != nil {
		log.Error("a removal is missing in the audit log", zap.String("workload", w.ID), zap.Error(err))
	}
}

// ended writes the line of a call that is over.
func (a *auditCall) ended(log *zap.Logger, answer error) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.over = true
	if a.line.Request == nil && a.request != nil { // it did not come that far
		a.line.Request = auditedRequest(a.request)
	}
	took := time.Since(a.began).Milliseconds()
	a.line.TookMS = &took
	a.line.Code = status.Code(answer).String()
	if info := errorInfo(answer); info != nil {
		a.line.Reason = info.GetReason()
		if status.Code(answer) == codes.PermissionDenied {
			a.line.Decision, a.line.Rule = "denied", shortened(info.GetMetadata()["rule"])
		}
	}
	if a.stream && a.line.Decision == "allowed" {
		a.line.Part = "end"
	}
	write := a.log.Write
	if a.room {
		write = a.log.End
	}
	if err := write(a.line); err != nil {
		log.Error("a call is missing in the audit log", zap.String("method", a.line.Method), zap.String("workload", a.line.Workload),
			zap.String("code", a.line.Code), zap.Error(err))
	}
}

func errorInfo(err error) *errdetails.ErrorInfo {
	if err == nil {
		return nil
	}
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info
		}
	}
	return nil
}

// auditedRequest is what of a request may be in the log, by the names of its fields.
func auditedRequest(m proto.Message) map[string]any {
	for _, bound := range auditBounds {
		out := bound.message(m.ProtoReflect())
		if b, err := json.Marshal(out); err == nil && len(b) <= auditRequestBytes {
			return out
		}
	}
	return map[string]any{"left_out": "too large"}
}

func (b auditBound) message(m protoreflect.Message) map[string]any {
	out := map[string]any{}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		row, name := fields[f.FullName()], string(f.Name())
		switch {
		case row.summary != nil:
			out[name] = row.summary(b, v)
		case f.IsMap() && row.audited:
			out[name] = b.ofMap(v.Map())
		case f.IsList() && (row.audited || holdsMessages(f)):
			if list := b.list(f, v.List()); len(list) > 0 {
				out[name] = list
			}
		case holdsMessages(f):
			// Its own fields have rows.
			if below := b.message(v.Message()); len(below) > 0 {
				out[name] = below
			}
		case row.audited:
			out[name] = b.value(f, v)
		}
		return true
	})
	return out
}

func holdsMessages(f protoreflect.FieldDescriptor) bool {
	return f.Kind() == protoreflect.MessageKind && !f.IsMap() && ours(f.Message())
}

func (b auditBound) ofMap(m protoreflect.Map) map[string]any {
	out := map[string]any{}
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		if len(out) == b.items {
			out["…"] = m.Len()
			return false
		}
		out[b.text(k.String())] = b.text(v.String())
		return true
	})
	return out
}

func (b auditBound) list(f protoreflect.FieldDescriptor, l protoreflect.List) []any {
	var out []any
	for i := range l.Len() {
		if i == b.items {
			return append(out, fmt.Sprintf("… %d in all", l.Len()))
		}
		if !holdsMessages(f) {
			out = append(out, b.value(f, l.Get(i)))
		} else if below := b.message(l.Get(i).Message()); len(below) > 0 {
			out = append(out, below)
		}
	}
	return out
}

func (b auditBound) value(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch f.Kind() {
	case protoreflect.EnumKind:
		if d := f.Enum().Values().ByNumber(v.Enum()); d != nil {
			return string(d.Name())
		}
		return v.Enum()
	case protoreflect.MessageKind:
		// Durations, times and masks: a string of JSON.
		j, err := protojson.Marshal(v.Message().Interface())
		if err != nil {
			return nil
		}
		return b.text(strings.Trim(string(j), `"`))
	case protoreflect.StringKind:
		return b.text(v.String())
	case protoreflect.BytesKind:
		return fmt.Sprintf("%d bytes", len(v.Bytes()))
	default:
		return v.Interface()
	}
}

// text is a beginning of a string. Control characters would take six bytes each.
func (b auditBound) text(s string) string {
	short := s
	if len(s) > b.stringBytes {
		short = s[:b.stringBytes]
	}
	short = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return utf8.RuneError
		}
		return r
	}, strings.ToValidUTF8(short, ""))
	if len(s) > b.stringBytes {
		short += "…"
	}
	return short
}

func shortened(s string) string { return auditBounds[0].text(s) }

// Summaries of what may be secret.

// counted: how many there are.
func counted(_ auditBound, v protoreflect.Value) any { return v.List().Len() }

// program is the first of a command's words: the rest may hold a password.
func program(b auditBound, v protoreflect.Value) any {
	l := v.List()
	if l.Len() == 0 {
		return nil
	}
	return map[string]any{"program": b.text(l.Get(0).String()), "arguments": l.Len() - 1}
}

// variables are the names of an environment's.
func variables(b auditBound, v protoreflect.Value) any {
	var names []string
	for i := range v.List().Len() {
		if i == b.items {
			return append(names, fmt.Sprintf("… %d in all", v.List().Len()))
		}
		name, _, _ := strings.Cut(v.List().Get(i).String(), "=")
		names = append(names, b.text(name))
	}
	return names
}

// sized: how long it is.
func sized(_ auditBound, v protoreflect.Value) any { return fmt.Sprintf("%d bytes", len(v.String())) }
