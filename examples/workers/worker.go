// A worker for inferq in one file: docs/worker-protocol.md, in Go's standard library. README.md: how to run it.
//
// A loop for each shard claims jobs; a call for messages is held meanwhile. Claims are answered at once, and sent one
// after another, so what they give cannot be confused. Each attempt has a goroutine that reads the engine and sends.
// One goroutine runs at a time: it holds mu, except while it waits.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"math/rand"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	answerLimit, holdTime      = 10 * time.Second, 20 * time.Second
	drainSeconds, leaveSeconds = 30, 5
	maxClaim, maxPiece         = 32, 1 << 20 // jobs, bytes
)

var (
	mu        sync.Mutex
	routers   = strings.Split(os.Getenv("ROUTER_URL"), ",") // the one in use first
	engine    = strings.TrimSuffix(strings.TrimRight(os.Getenv("ENGINE_URL"), "/"), "/v1")
	key, name = os.Getenv("WORKER_KEY"), os.Getenv("WORKER_ID")
	slots     = 4
	done      = regexp.MustCompile(`(?m)^data: *\[DONE\]`)

	// Ends with SIGTERM, or by drain: no more jobs are claimed then.
	signalled, _    = signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	stopping, drain = context.WithCancel(signalled)
)

type object map[string]any

// answer has the fields of all answers that are read here.
type answer struct {
	status     int
	retryAfter float64 // seconds
	Shards     int
	IntervalMS int `json:"heartbeat_interval_ms"`
	Assignment assignment
	Drain      bool
	Claimed    struct {
		Jobs   []job
		Parked bool
	}
	Messages []struct {
		ID, Kind string
		JobID    string `json:"job_id"`
	}
	Lost, Answers []string
	Error         struct{ Code, Message string }
	Data          []struct{ ID string } // of an engine's /v1/models
}

// assignment is what the session may claim.
type assignment struct {
	Term, Version int
	Pools         []struct {
		Pool  string
		Lanes []string
		Shard int
	}
}

type job struct {
	Lease, Path, Body, Encoding, Traceparent string
	ID                                       string `json:"job_id"`
	ContentType                              string `json:"content_type"`
	Headers                                  map[string]string
	Stream                                   bool
	Attempt                                  int
	MaxAttempts                              int           `json:"max_attempts"`
	RemainingMS                              time.Duration `json:"remaining_ms"`
}

// start runs something beside the rest.
func start(do func()) {
	go func() {
		mu.Lock()
		defer mu.Unlock()
		do()
	}()
}

// wait lets others run meanwhile.
func wait(do func()) {
	mu.Unlock()
	defer mu.Lock()
	do()
}

// pause waits until flag is set, for some seconds at most. It returns false if ctx has ended.
func pause(ctx context.Context, seconds float64, flag chan bool) bool {
	wait(func() {
		select {
		case <-time.After(time.Duration(seconds * float64(time.Second))):
		case <-flag:
		case <-ctx.Done():
		}
	})
	return ctx.Err() == nil
}

func set(flag chan bool) {
	if len(flag) == 0 {
		flag <- true
	}
}

// request returns an answer as soon as it begins. Headers without a value are left out.
func request(ctx context.Context, method, url string, headers map[string]string, body []byte) (*http.Response, error) {
	mu.Unlock()
	defer mu.Lock()
	request, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for name, value := range headers {
		if value != "" {
			request.Header.Set(name, value)
		}
	}
	return http.DefaultClient.Do(request)
}

// ask makes one call, and reads the answer.
func ask(ctx context.Context, limit time.Duration, method, url, bearer string, message object) (got answer, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var body []byte
	if message != nil {
		body, _ = json.Marshal(message)
	}
	headers := map[string]string{"content-type": "application/json", "authorization": bearer}
	response, err := request(ctx, method, url, headers, body)
	if err != nil {
		return got, err
	}
	defer response.Body.Close()
	got.status = response.StatusCode
	got.retryAfter, _ = strconv.ParseFloat(response.Header.Get("retry-after"), 64)
	wait(func() { body, err = io.ReadAll(response.Body) })
	if err == nil && got.status != http.StatusNoContent {
		err = json.Unmarshal(body, &got)
	}
	return got, err
}

// session lasts from a join until the worker ends, or is declared dead: then no attempt goes on.
type session struct {
	id       string
	ctx      context.Context
	end      context.CancelFunc
	engine   string // its state
	models   []string
	beat     chan bool // a heartbeat is due
	interval float64   // of heartbeats, in seconds
	assigned assignment
	shards   []*shard
	claiming int                 // slots for which claims are under way
	running  map[string]*attempt // by lease
}

// shard is a part of the queue. due: jobs are to be claimed though it is parked; lost: the queue may have lost what it
// was told; look: there is something to do.
type shard struct {
	number, seq, turn int
	after             string
	parked, due       bool
	lost, isHeld      bool
	look              chan bool
}

// call sends a message until a Router answers: to the next one, or after a pause that grows. The answer is empty if ctx
// ends before. at, if not nil, is the shard that is to be reconciled if the call fails. A refusal is returned to attempts
// and heartbeats; of other calls it is the end of the worker.
func (s *session) call(ctx context.Context, what string, message object, at *shard) answer {
	path, method, limit := strings.TrimSuffix("/worker/v1/sessions/"+what, "/"), "POST", answerLimit
	if message == nil {
		method = "DELETE"
	}
	if message["wait_ms"] != nil {
		limit += holdTime
	}
	for failures := 1; ; failures++ {
		router := routers[0]
		got, err := ask(ctx, limit, method, strings.Trim(router, " /")+path, "Bearer "+key, message)
		switch {
		case ctx.Err() != nil:
			return answer{}
		case err == nil && got.Error.Code == "fenced":
			log.Print("the session was declared dead")
			s.end()
			return answer{}
		case err == nil && (got.status < 300 || got.status == 410 && strings.HasSuffix(what, "/heartbeat")):
			return got
		case err == nil && strings.Contains("400 403 410 413 415", strconv.Itoa(got.status)):
			log.Printf("a Router refuses a call: %s: %s", what, got.Error.Message)
			if ctx == s.ctx {
				os.Exit(1)
			}
			return got
		}
		log.Printf("call failed: %s at %s: %d %s %v", what, router, got.status, got.Error.Message, err)
		if at != nil {
			message["wait_ms"] = 0 // to know soon when the queue is back
			at.lost = true
			set(at.look)
		}
		if routers[0] == router {
			routers = append(routers[1:], router)
		}
		if failures%len(routers) == 0 {
			grown := math.Min(0.1*math.Pow(2, float64(failures/len(routers))), 2) * (0.5 + rand.Float64()/2)
			pause(ctx, math.Max(grown, math.Min(got.retryAfter, 10)), nil)
		}
	}
}

// run ends once the worker has drained, or the session is declared dead.
func (s *session) run() {
	start(s.serve)
	s.until(math.Inf(1), func() bool { return stopping.Err() != nil })
	s.look(false)
	s.until(drainSeconds, func() bool { return len(s.running)+s.claiming == 0 })
	ctx, cancel := context.WithTimeout(s.ctx, leaveSeconds*time.Second)
	defer cancel()
	s.call(ctx, s.id, nil, nil) // what still runs is given to others
	s.end()
}

// until waits for some seconds at most.
func (s *session) until(seconds float64, holds func() bool) {
	for began := time.Now(); !holds() && time.Since(began).Seconds() < seconds && pause(s.ctx, 0.02, nil); {
	}
}

// serve joins, follows the shards, and sends heartbeats. While the engine does not answer no jobs are claimed.
func (s *session) serve() {
	for !s.readEngine() && pause(s.ctx, 1, nil) {
	}
	message := object{"worker_id": name, "session_id": s.id, "slots": slots}
	for what := ""; s.ctx.Err() == nil; { // a join, then heartbeats
		message["models"], message["engine"], message["running"] = s.models, s.engine, len(s.running)
		got := s.call(s.ctx, what, message, nil)
		if got.status == 410 { // the Manager has forgotten this worker
			what, message["again"] = "", true
			continue
		}
		for n := len(s.shards); n < got.Shards; n++ {
			at := &shard{number: n, after: "0", look: make(chan bool, 1)}
			s.shards = append(s.shards, at)
			start(func() { s.follow(at) })
		}
		if known, given := s.assigned, got.Assignment; known.Term != given.Term || known.Version != given.Version {
			s.assigned = given
			s.look(true)
		}
		if got.Drain {
			drain()
		}
		if got.IntervalMS > 0 { // as a join is answered
			what, s.interval = s.id+"/heartbeat", float64(got.IntervalMS)/1000
		}
		pause(s.ctx, s.interval, s.beat)
		if s.engine != "ready" {
			s.readEngine()
		}
	}
}

// readEngine asks the engine what it serves.
func (s *session) readEngine() bool {
	got, err := ask(s.ctx, time.Second, "GET", engine+"/v1/models", "", nil)
	if err != nil || len(got.Data) == 0 {
		log.Printf("the engine at %s names no models: %v", engine, err)
		return false
	}
	s.engine, s.models = "ready", nil
	for _, model := range got.Data {
		s.models = append(s.models, model.ID)
	}
	s.look(true)
	return true
}

// look has the shards see whether jobs are to be claimed; due: even on those that are parked.
func (s *session) look(due bool) {
	for _, at := range s.shards {
		at.due = at.due || due
		set(at.look)
	}
}

// follow claims the jobs of a shard, and does what its messages say.
func (s *session) follow(at *shard) {
	for held := make(chan answer, 1); s.ctx.Err() == nil; pause(s.ctx, 60, at.look) {
		if len(held) > 0 {
			at.isHeld, at.due = false, true // jobs are claimed after any message
			s.obey(at, <-held)
		}
		if at.lost {
			s.reconcile(at)
		}
		s.claim(at)
		if !at.isHeld {
			at.isHeld = true
			asked := object{"shard": at.number, "after": at.after, "wait_ms": holdTime.Milliseconds()}
			start(func() {
				held <- s.call(s.ctx, s.id+"/claim", asked, at)
				set(at.look)
			})
		}
	}
}

// obey does what messages say.
func (s *session) obey(at *shard, got answer) {
	for _, message := range got.Messages {
		at.after = message.ID
		switch message.Kind {
		case "ping":
			set(s.beat)
		case "drain":
			drain()
		case "abort":
			for _, a := range s.running {
				if a.job.ID == message.JobID {
					a.stop("", "it was aborted")
				}
			}
		}
	}
}

// claim claims jobs for the slots that are free. A worker that is parked, and runs no more jobs, claims none, once: else
// the queue goes on waking it instead of others.
func (s *session) claim(at *shard) {
	pools, n := []object{}, 0
	for _, one := range s.assigned.Pools {
		if one.Shard == at.number {
			pools = append(pools, object{"pool": one.Pool, "lanes": one.Lanes})
		}
	}
	if len(pools) > 0 && s.engine == "ready" && stopping.Err() == nil {
		n = int(math.Min(float64(slots-len(s.running)-s.claiming), maxClaim))
	}
	if n > 0 && at.parked && !at.due || n == 0 && !at.parked {
		return
	}
	at.seq, at.parked, at.due, s.claiming = at.seq+1, false, false, s.claiming+n
	claim := object{"seq": at.seq, "turn": at.turn, "n": n, "pools": pools}
	got := s.call(s.ctx, s.id+"/claim", object{"shard": at.number, "claim": claim}, at).Claimed
	at.turn, at.parked, s.claiming = at.turn+len(got.Jobs), got.Parked, s.claiming-n
	for _, job := range got.Jobs {
		a := &attempt{job: job, of: s, at: at}
		a.ctx, a.quit = context.WithTimeout(s.ctx, job.RemainingMS*time.Millisecond+answerLimit)
		s.running[job.Lease] = a
		start(a.run)
	}
	if at.parked || len(got.Jobs) == n {
		s.look(false) // slots are left for other shards, or more jobs wait
	}
}

// reconcile says what runs of a shard, and stops what the queue has lost.
func (s *session) reconcile(at *shard) {
	at.lost = false
	leases := []string{}
	for lease, a := range s.running {
		if a.at == at {
			leases = append(leases, lease)
		}
	}
	asked := object{"shard": at.number, "seq": at.seq, "after": at.after, "leases": leases}
	for _, lease := range s.call(s.ctx, s.id+"/reconcile", asked, nil).Lost {
		if a := s.running[lease]; a != nil {
			a.stop("", "the queue has lost it")
		}
	}
}

// attempt is a job that runs here. seq: the number of its next piece; kind and reason: see stop.
type attempt struct {
	job          job
	of           *session
	at           *shard
	ctx          context.Context
	quit         context.CancelFunc
	head         object
	status, seq  int
	kind, reason string
}

// stop ends it without an answer. It is released as kind says; if that is empty nothing is said of it.
func (a *attempt) stop(kind, reason string) {
	if a.ctx.Err() == nil {
		a.kind, a.reason = kind, reason
		a.quit()
	}
}

func (a *attempt) run() {
	s, began := a.of, time.Now()
	last, err := a.askEngine()
	if err != nil && a.ctx.Err() == nil {
		a.stop("spent", err.Error())
		s.engine = "failed" // unless it answers
		set(s.beat)
	}
	outcome := map[bool]string{false: "done", true: "failed"}[a.status >= 400]
	if err != nil || !a.send("/settle", last, object{"outcome": outcome, "run_ms": time.Since(began).Milliseconds()}) {
		log.Printf("job %s ends without an answer: %s %s", a.job.ID, a.kind, a.reason)
	}
	if a.kind != "" {
		release := object{"lease": a.job.Lease, "kind": a.kind, "reason": fmt.Sprintf("%.500s", a.reason)}
		s.call(s.ctx, s.id+"/release", object{"attempts": []object{release}}, nil)
	}
	a.quit()
	delete(s.running, a.job.Lease)
	s.look(false)
}

// askEngine sends the engine's answer but for its last piece, which is returned. What earlier attempts said (prefix)
// is left alone: the job runs from its start, and the Router compares and goes on from there.
func (a *attempt) askEngine() (last []byte, err error) {
	job, body := a.job, []byte(a.job.Body)
	if job.Encoding == "base64" {
		body, _ = base64.StdEncoding.DecodeString(job.Body)
	}
	// A connection that was kept may be closed just as a job is sent.
	headers := map[string]string{"content-type": job.ContentType, "connection": "close", "traceparent": job.Traceparent}
	for name, value := range job.Headers {
		headers[name] = value
	}
	answer, err := request(a.ctx, "POST", engine+job.Path, headers, body)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	contentType := fmt.Sprintf("%.1000s", answer.Header.Get("content-type"))
	a.status, a.head = answer.StatusCode, object{"status": answer.StatusCode, "content_type": contentType}
	if a.status >= 500 && job.Attempt < job.MaxAttempts {
		return nil, errors.New("the engine answers " + answer.Status)
	}
	if job.Stream && a.status < 400 && strings.HasPrefix(contentType, "text/event-stream") {
		return a.relay(answer.Body)
	}
	wait(func() { last, err = io.ReadAll(answer.Body) })
	if strings.HasPrefix(contentType, "application/json") && !json.Valid(last) {
		return nil, errors.New("the engine's answer is no JSON")
	}
	for ; err == nil && len(last) > maxPiece; last = last[maxPiece:] {
		if !a.send("/output", last[:maxPiece], object{}) {
			return nil, a.ctx.Err()
		}
	}
	return last, err
}

// relay sends whole events as they come; those that come during a call go with the next one, and no more is read.
func (a *attempt) relay(engine io.Reader) (events []byte, err error) {
	data, n := make([]byte, 64<<10), 0
	for err == nil {
		wait(func() { n, err = engine.Read(data) })
		events = bytes.ReplaceAll(append(events, data[:n]...), []byte("\r\n"), []byte("\n"))
		if end := bytes.LastIndex(events, []byte("\n\n")) + 2; end > 1 {
			if done.Match(events[:end]) {
				return events[:end], nil
			}
			if !a.send("/output", events[:end], object{}) {
				return nil, a.ctx.Err()
			}
			events = events[end:]
		}
	}
	if err == io.EOF && !strings.HasSuffix(a.job.Path, "/completions") {
		return events, nil
	}
	return nil, fmt.Errorf("the engine broke off: %w", err)
}

// send sends a piece until it is taken, and returns whether it was.
func (a *attempt) send(what string, data []byte, piece object) bool {
	piece["lease"], piece["seq"], piece["data"] = a.job.Lease, a.seq, []string{string(data)}
	if !utf8.Valid(data) {
		piece["data"], piece["encoding"] = []string{base64.StdEncoding.EncodeToString(data)}, "base64"
	}
	if a.seq == 0 {
		piece["head"] = a.head
	}
	for a.ctx.Err() == nil {
		got := a.of.call(a.ctx, a.of.id+what, object{"attempts": []object{piece}}, nil)
		switch answer := strings.Join(got.Answers, ""); {
		case answer == "ok" || answer == "duplicate":
			a.seq++
			return true
		case answer == "gone":
			a.stop("handed_back", "nobody waits for it")
		case answer == "fenced":
			a.stop("", "it was given to another worker")
		case got.status >= 400:
			a.stop("spent", "a Router refused the answer: "+got.Error.Message)
		default: // nobody reads
			pause(a.ctx, 0.25, nil)
		}
	}
	return false
}

func main() {
	mu.Lock()
	rand.Seed(time.Now().UnixNano())
	transport := http.DefaultTransport.(*http.Transport)
	transport.MaxIdleConnsPerHost, transport.DisableCompression = 64, true
	if name == "" {
		name, _ = os.Hostname()
	}
	_, _ = fmt.Sscan(os.Getenv("WORKER_SLOTS"), &slots)
	for stopping.Err() == nil {
		s := &session{id: fmt.Sprintf("%s.%016x", name, rand.Uint64()), beat: make(chan bool, 1),
			running: map[string]*attempt{}}
		s.ctx, s.end = context.WithCancel(context.Background())
		s.run()
	}
}
