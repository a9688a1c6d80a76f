package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// A call is authorized in two steps: when it comes, by its method; when its first message has come, by what is in it.
// Roles don't add up: one of them must allow all of it.

// permit is what the caller of a call may do in it.
type permit struct {
	caller spec.Caller
	// Those with the method's verb.
	roles []*access.Role
	// All of them: any lets the caller see a workload.
	all []*access.Role
	// The one that allowed the message; nil before.
	role *access.Role
}

type permitKey struct{}

func permitOf(ctx context.Context) *permit {
	p, _ := ctx.Value(permitKey{}).(*permit)
	if p == nil {
		return &permit{} // nothing
	}
	return p
}

// rolesOf are the roles that allow the call of ctx.
func rolesOf(ctx context.Context) []*access.Role { return permitOf(ctx).roles }

func (p *permit) everything() *access.Role {
	for _, r := range p.roles {
		if r.Everything {
			return r
		}
	}
	return nil
}

// sees reports whether the caller may know of a workload.
func (p *permit) sees(labels map[string]string, owner spec.Caller) bool {
	return anySelects(p.all, labels, owner, p.caller)
}

// lists reports whether the verb of the call may be used on a workload.
func (p *permit) lists(labels map[string]string, owner spec.Caller) bool {
	return anySelects(p.roles, labels, owner, p.caller)
}

// hears reports whether an event is the caller's business.
func (p *permit) hears(e workload.Event) bool {
	if e.WorkloadID != "" {
		return p.lists(e.Labels, e.Owner)
	}
	// Of an image.
	for _, r := range p.all {
		if r.Allows(access.ImagesView) && r.Uses(strings.Split(e.Attributes["image"], ",")...) == "" {
			return true
		}
	}
	return false
}

func anySelects(roles []*access.Role, labels map[string]string, owner, caller spec.Caller) bool {
	for _, r := range roles {
		if r.Selects(labels, owner, caller) {
			return true
		}
	}
	return false
}

// SetAccess has calls from now on follow another table. That is in the audit log, too.
func (s *Server) SetAccess(t *access.Table) {
	s.access.Store(t)
	s.auditRoles()
}

// authorize is the first step: whether the caller may use the method at all.
func (s *Server) authorize(ctx context.Context, method string) (*permit, error) {
	caller, identified := callerOf(ctx)
	row := methods[method]
	if !identified || row.verb == "" && !row.open {
		return nil, forbidden("", "this caller may not call %s", method)
	}
	p := &permit{caller: caller, all: s.access.Load().RolesOf(caller)}
	if row.open {
		return p, nil
	}
	if len(p.all) == 0 {
		return nil, forbidden("grants", "%s has no role here: a grant in the daemon's access file gives one", who(caller))
	}
	var lacking []string
	var verb access.Verb
	for _, r := range p.all {
		lacks := slices.IndexFunc(row.verbs(), func(v access.Verb) bool { return !r.Allows(v) })
		if lacks < 0 {
			p.roles = append(p.roles, r)
			continue
		}
		lacking, verb = append(lacking, r.Name), row.verbs()[lacks]
	}
	if len(p.roles) == 0 {
		return nil, forbidden(lacking[0]+".may", "%s may not %s: its role %s does not say %q", who(caller), method, strings.Join(lacking, ", "), verb)
	}
	return p, nil
}

// verbs are all that a role must allow.
func (r row) verbs() []access.Verb { return append([]access.Verb{r.verb}, r.also...) }

// authorizeMessage is the second step: whether one of the roles allows what the message asks for. It replaces the id in
// it by the full one of the workload that was looked at, so that the handler acts on no other.
func (s *Server) authorizeMessage(ctx context.Context, method string, m proto.Message) error {
	p, row := permitOf(ctx), methods[method]
	if row.open {
		return nil
	}
	if r := p.everything(); r != nil {
		p.role = r
		return nil
	}
	roles := p.roles
	var err error
	if row.on == onSnapshot {
		if roles, err = s.rolesOnSnapshot(p, row, m); err != nil {
			return err
		}
	}
	if row.on == onWorkload || row.on == onVisible {
		if roles, err = s.rolesOn(p, row, m); err != nil {
			return err
		}
	}
	var whys []string
	rule := ""
	for _, r := range roles {
		why := s.refusal(r, m.ProtoReflect())
		if why == "" {
			p.role = r
			return nil
		}
		key, _, _ := strings.Cut(why, ":")
		rule = cmp.Or(rule, r.Name+"."+key)
		whys = append(whys, fmt.Sprintf("role %q refuses: %s", r.Name, why))
	}
	return forbidden(rule, "%s may not ask for this: %s", who(p.caller), strings.Join(whys, "; "))
}

// rolesOn are the roles that select the workload which m names; all if it names none.
func (s *Server) rolesOn(p *permit, row row, m proto.Message) ([]*access.Role, error) {
	in, id := idField(m.ProtoReflect())
	if id == nil && row.on == onVisible {
		return p.roles, nil
	}
	if id == nil {
		return nil, spec.Invalidf("start", "the first request of the stream must name a workload")
	}
	ref := in.Get(id).String()
	if ref == "" && row.on == onVisible {
		return p.roles, nil
	}
	w, err := s.Workloads.Get(ref)
	if err != nil || !p.sees(w.Labels, w.Owner) {
		// Also in place of "more than one has this beginning": that would tell of others.
		return nil, workload.NotFound(ref)
	}
	in.Set(id, protoreflect.ValueOfString(w.ID))
	return p.selecting(row, w.Labels, w.Owner)
}

// selecting are the roles that select a workload, or a snapshot of it.
func (p *permit) selecting(row row, labels map[string]string, owner spec.Caller) ([]*access.Role, error) {
	var roles []*access.Role
	for _, r := range p.roles {
		if r.Selects(labels, owner, p.caller) {
			roles = append(roles, r)
		}
	}
	if len(roles) == 0 {
		return nil, forbidden(p.roles[0].Name+".workloads", "%s may not %s this workload: role %q does not select it", who(p.caller), row.verb, p.roles[0].Name)
	}
	return roles, nil
}

// idField is where a request names a workload: in itself, or in its start. A page of a list names none: nil.
func idField(m protoreflect.Message) (in protoreflect.Message, id protoreflect.FieldDescriptor) {
	if id := m.Descriptor().Fields().ByName("id"); id != nil && id.Kind() == protoreflect.StringKind {
		return m, id
	}
	if start := m.Descriptor().Fields().ByName("start"); start != nil && m.Has(start) {
		return idField(m.Mutable(start).Message())
	}
	return m, nil
}

// refusal is why a role may not set the fields of m as they are set; empty if it may.
func (s *Server) refusal(r *access.Role, m protoreflect.Message) string {
	all := m.Descriptor().Fields()
	each := make([]protoreflect.FieldDescriptor, all.Len())
	for i := range each {
		each[i] = all.Get(i)
	}
	return s.refusalOf(r, m, each)
}

// refusalOf is refusal for some of the fields.
func (s *Server) refusalOf(r *access.Role, m protoreflect.Message, some []protoreflect.FieldDescriptor) string {
	for _, f := range some {
		row, known := fields[f.FullName()]
		if !m.Has(f) && !row.unset {
			continue
		}
		if !known {
			return fmt.Sprintf("fields: %s is not known to the access table", f.FullName())
		}
		if row.check != nil {
			if why := row.check(s, r, m.Interface()); why != "" {
				return why
			}
		}
		why := ""
		if row.only != nil {
			why = s.refusalOf(r, m.Get(f).Message(), row.only(m.Interface()))
		} else {
			why = s.refusalBelow(r, m, f)
		}
		if why != "" {
			return why
		}
	}
	return ""
}

// refusalBelow is refusal for the messages in a field. One that is not set is looked at as an empty one, but not within
// a choice of which another is set.
func (s *Server) refusalBelow(r *access.Role, m protoreflect.Message, f protoreflect.FieldDescriptor) string {
	if f.Kind() != protoreflect.MessageKind || f.IsMap() || !ours(f.Message()) {
		return ""
	}
	if !f.IsList() {
		return s.refusal(r, m.Get(f).Message())
	}
	list := m.Get(f).List()
	for i := range list.Len() {
		if why := s.refusal(r, list.Get(i).Message()); why != "" {
			return why
		}
	}
	return ""
}

// ours: durations, times and masks have no parts to decide about.
func ours(m protoreflect.MessageDescriptor) bool { return m.ParentFile().Package() == "sandboxd.v1" }

func who(c spec.Caller) string {
	if len(c.Names) > 0 {
		return "certificate " + strings.Join(c.Names, ",")
	}
	return fmt.Sprintf("user %d", c.UID)
}

func forbidden(rule, format string, args ...any) error {
	e := spec.Errorf(spec.KindDenied, format, args...).WithReason(reasonForbidden)
	e.Rule = rule
	return e
}
