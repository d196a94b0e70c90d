//! A compressed radix tree over tokens.
//!
//! Nodes lie in one `Vec` and know each other by index, so that no depth, not a million tokens, overflows the stack,
//! in dropping either. Each edge owns its tokens: the tree holds the only copy of what was stored.

use std::cmp::Reverse;

const ROOT: usize = 0;
/// No node: the `nearest` of a node that is being made.
const NONE: usize = usize::MAX;

/// Where a value lies. It stays right until that value is taken out, whatever else comes and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(usize);

/// Values under sequences of tokens.
#[derive(Clone, Debug)]
pub struct Radix<V> {
    nodes: Vec<Node<V>>,
    free: Vec<usize>,
    n_values: usize,
    /// Branches made so far.
    n_born: u64,
}

/// A branching point, or the end of a stored sequence. Every node but the root has a value at it or below.
#[derive(Clone, Debug)]
struct Node<V> {
    parent: usize,
    /// Tokens from the parent to here; empty for the root alone.
    edge: Vec<i64>,
    /// Tokens from the root to here.
    depth: usize,
    /// By first token, in its order.
    children: Vec<(i64, usize)>,
    value: Option<V>,
    /// The node of the shortest stored sequence at or below; of several, on the branch that was made last. Nobody asks
    /// the root for it.
    nearest: usize,
    /// When the branch was made, that is when its first token was.
    born: u64,
}

/// What a tree has for a query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The query itself, if it is stored. Then nothing else is told.
    pub exact: Option<Key>,
    /// The longest stored sequence that the query starts with, and its number of tokens.
    pub shorter: Option<(Key, usize)>,
    /// The shortest stored sequence that starts with the common prefix, if that is not empty.
    pub longer: Option<Key>,
    /// Tokens at the start of the query that some stored sequence starts with too.
    pub common_prefix: usize,
}

/// How far a walk along a query came.
struct Place {
    /// Deepest node that was reached.
    node: usize,
    /// The child into whose edge the walk went without coming to its end.
    inside: Option<usize>,
    n_tokens: usize,
}

impl<V> Default for Radix<V> {
    fn default() -> Self {
        Self { nodes: vec![Node::new(ROOT, Vec::new(), 0, 0)], free: Vec::new(), n_values: 0, n_born: 0 }
    }
}

impl<V> Node<V> {
    const fn new(parent: usize, edge: Vec<i64>, depth: usize, born: u64) -> Self {
        Self { parent, edge, depth, children: Vec::new(), value: None, nearest: NONE, born }
    }
}

impl<V> Radix<V> {
    /// Number of stored values.
    pub fn len(&self) -> usize {
        self.n_values
    }

    /// True if nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.n_values == 0
    }

    /// The value at `key`.
    pub fn get(&self, key: Key) -> Option<&V> {
        self.nodes.get(key.0)?.value.as_ref()
    }

    /// Number of tokens that lead to `key`.
    pub fn depth(&self, key: Key) -> usize {
        self.nodes[key.0].depth
    }

    /// The tokens that lead to `key`.
    pub fn tokens(&self, key: Key) -> Vec<i64> {
        let mut tokens = vec![0; self.depth(key)];
        let mut node = key.0;
        while node != ROOT {
            let Node { edge, depth, parent, .. } = &self.nodes[node];
            tokens[depth - edge.len()..*depth].copy_from_slice(edge);
            node = *parent;
        }
        tokens
    }

    /// The values, in no order.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.nodes.iter().filter_map(|node| node.value.as_ref())
    }

    /// All values with their places; branches in the order in which they were made.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &V)> {
        let mut waiting = vec![ROOT];
        std::iter::from_fn(move || {
            let node = waiting.pop()?;
            let first = waiting.len();
            waiting.extend(self.nodes[node].children.iter().map(|&(_, child)| child));
            waiting[first..].sort_unstable_by_key(|&child| Reverse(self.nodes[child].born));
            Some(node)
        })
        .filter_map(|node| Some((Key(node), self.nodes[node].value.as_ref()?)))
    }

    /// Where `tokens` are stored.
    pub fn find(&self, tokens: &[i64]) -> Option<Key> {
        let place = self.walk(tokens, |_| ());
        let is_node = place.inside.is_none() && place.n_tokens == tokens.len();
        (is_node && self.nodes[place.node].value.is_some()).then_some(Key(place.node))
    }

    /// What there is for `tokens`, in time linear in them.
    pub fn search(&self, tokens: &[i64]) -> Match {
        let mut last = None;
        let place = self.walk(tokens, |node| {
            if self.nodes[node].value.is_some() {
                last = Some((Key(node), self.nodes[node].depth));
            }
        });
        if let Some((key, n_tokens)) = last
            && n_tokens == tokens.len()
        {
            return Match { exact: Some(key), ..Match::default() };
        }
        let reached = place.inside.unwrap_or(place.node);
        let longer = (place.n_tokens > 0).then(|| Key(self.nodes[reached].nearest));
        Match { exact: None, shorter: last, longer, common_prefix: place.n_tokens }
    }

    /// Stores `value` under `tokens` and gives what lay there.
    pub fn insert(&mut self, tokens: &[i64], value: V) -> (Key, Option<V>) {
        let place = self.walk(tokens, |_| ());
        let mut node = place.node;
        if let Some(child) = place.inside {
            node = self.split(child, place.n_tokens - self.nodes[node].depth);
        }
        if place.n_tokens < tokens.len() {
            node = self.add_leaf(node, &tokens[place.n_tokens..]);
        }
        let before = self.nodes[node].value.replace(value);
        self.n_values += usize::from(before.is_none());
        self.refresh(node);
        (Key(node), before)
    }

    /// Takes the value at `key` out, and the branch if nothing else hangs on it.
    pub fn remove(&mut self, key: Key) -> Option<V> {
        let node = key.0;
        let value = self.nodes.get_mut(node)?.value.take()?;
        self.n_values -= 1;
        let mut left = node;
        if node != ROOT && self.nodes[node].children.is_empty() {
            left = self.nodes[node].parent;
            let first = self.nodes[node].edge[0];
            self.nodes[left].children.retain(|&(token, _)| token != first);
            self.release(node);
        }
        if left != ROOT && self.is_bend(left) {
            let bend = left;
            left = self.nodes[bend].parent;
            self.straighten(&[bend, self.nodes[bend].children[0].1]);
        }
        self.refresh(left);
        Some(value)
    }

    /// Takes out all values at proper prefixes of `tokens`, the shortest first, each with its number of tokens. None,
    /// and nothing happens, if no stored sequence starts with `tokens`.
    pub fn remove_prefixes(&mut self, tokens: &[i64]) -> Option<Vec<(usize, V)>> {
        let mut path = Vec::new();
        let place = self.walk(tokens, |node| path.push(node));
        if place.n_tokens < tokens.len() {
            return None;
        }
        path.extend(place.inside);
        let mut taken = Vec::new();
        for &node in &path {
            let node = &mut self.nodes[node];
            if node.depth < tokens.len() {
                taken.extend(node.value.take().map(|value| (node.depth, value)));
            }
        }
        if !taken.is_empty() {
            self.n_values -= taken.len();
            // Several nodes have changed at once: no stopping early on the way up.
            for node in self.straighten(&path[1..]).into_iter().rev() {
                self.nodes[node].nearest = self.best(node);
            }
        }
        Some(taken)
    }

    /// Walks along `tokens` and tells `visit` each node that is reached, the root included.
    fn walk(&self, tokens: &[i64], mut visit: impl FnMut(usize)) -> Place {
        let (mut node, mut n_tokens) = (ROOT, 0);
        loop {
            visit(node);
            let rest = &tokens[n_tokens..];
            let Some(child) = rest.first().and_then(|&first| self.child(node, first)) else {
                return Place { node, inside: None, n_tokens };
            };
            let edge = &self.nodes[child].edge;
            let same = edge.iter().zip(rest).take_while(|(a, b)| a == b).count();
            n_tokens += same;
            if same < edge.len() {
                return Place { node, inside: Some(child), n_tokens };
            }
            node = child;
        }
    }

    fn child(&self, node: usize, first: i64) -> Option<usize> {
        let children = &self.nodes[node].children;
        children.binary_search_by_key(&first, |&(token, _)| token).ok().map(|at| children[at].1)
    }

    /// Hangs `child` below `node`, in the place of the child that starts with the same token, if there is one.
    fn attach(&mut self, node: usize, child: usize) {
        self.nodes[child].parent = node;
        let first = self.nodes[child].edge[0];
        let children = &mut self.nodes[node].children;
        match children.binary_search_by_key(&first, |&(token, _)| token) {
            Ok(at) => children[at].1 = child,
            Err(at) => children.insert(at, (first, child)),
        }
    }

    fn allocate(&mut self, node: Node<V>) -> usize {
        if let Some(index) = self.free.pop() {
            self.nodes[index] = node;
            return index;
        }
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn release(&mut self, node: usize) {
        self.nodes[node] = Node::new(ROOT, Vec::new(), 0, 0);
        self.free.push(node);
    }

    fn add_leaf(&mut self, parent: usize, edge: &[i64]) -> usize {
        self.n_born += 1;
        let leaf = Node::new(parent, edge.to_vec(), self.nodes[parent].depth + edge.len(), self.n_born);
        let leaf = self.allocate(leaf);
        self.attach(parent, leaf);
        leaf
    }

    /// Puts a node after the first `n_tokens` of the edge to `child`, which stays where it is.
    fn split(&mut self, child: usize, n_tokens: usize) -> usize {
        let Node { parent, edge, depth, born, nearest, .. } = &mut self.nodes[child];
        let (parent, depth) = (*parent, *depth - edge.len() + n_tokens);
        let rest = edge.split_off(n_tokens);
        let mut start = std::mem::replace(edge, rest);
        start.shrink_to_fit();
        let mut upper = Node::new(parent, start, depth, *born);
        upper.nearest = *nearest;
        let upper = self.allocate(upper);
        self.attach(parent, upper);
        self.attach(upper, child);
        upper
    }

    /// True for a node that the tree can do without.
    fn is_bend(&self, node: usize) -> bool {
        let node = &self.nodes[node];
        node.value.is_none() && node.children.len() == 1
    }

    /// Joins the edges along `path`, each node of which is the parent of the next, wherever a node is a bend; the last
    /// one stays. Gives the nodes that are left.
    fn straighten(&mut self, path: &[usize]) -> Vec<usize> {
        let Some(&last) = path.last() else { return Vec::new() };
        let mut above = self.nodes[path[0]].parent;
        let mut left = Vec::new();
        // Tokens of the bends since `above`, and when the first of them was made.
        let (mut start, mut born) = (Vec::new(), 0);
        for &node in path {
            if start.is_empty() {
                born = self.nodes[node].born;
            }
            if node != last && self.is_bend(node) {
                start.append(&mut self.nodes[node].edge);
                self.release(node);
                continue;
            }
            if !start.is_empty() {
                start.append(&mut self.nodes[node].edge);
                start.shrink_to_fit();
                self.nodes[node].edge = std::mem::take(&mut start);
                self.nodes[node].born = born;
                self.attach(above, node);
            }
            above = node;
            left.push(node);
        }
        left
    }

    /// Finds `nearest` anew for `node` and upwards, as far as it changes.
    fn refresh(&mut self, mut node: usize) {
        while node != ROOT {
            let best = self.best(node);
            if std::mem::replace(&mut self.nodes[node].nearest, best) == best {
                return;
            }
            node = self.nodes[node].parent;
        }
    }

    /// The node of the shortest stored sequence at or below `node`.
    fn best(&self, node: usize) -> usize {
        if self.nodes[node].value.is_some() {
            return node;
        }
        let children = self.nodes[node].children.iter().map(|&(_, child)| &self.nodes[child]);
        let best = children.min_by_key(|child| (self.nodes[child.nearest].depth, Reverse(child.born)));
        best.map_or(NONE, |child| child.nearest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every node but the root has a value or branches, and knows where it hangs; the others are free.
    fn check<V>(tree: &Radix<V>) {
        let mut waiting = vec![ROOT];
        let mut n_nodes = 0;
        while let Some(index) = waiting.pop() {
            n_nodes += 1;
            let node = &tree.nodes[index];
            assert!(index == ROOT || node.value.is_some() || node.children.len() > 1);
            for &(first, child) in &node.children {
                let Node { parent, edge, depth, .. } = &tree.nodes[child];
                assert_eq!((*parent, edge.first(), *depth), (index, Some(&first), node.depth + edge.len()));
                waiting.push(child);
            }
        }
        assert_eq!(n_nodes + tree.free.len(), tree.nodes.len());
    }

    proptest! {
        #[test]
        fn no_node_is_there_for_nothing(steps in prop::collection::vec((0..4, prop::collection::vec(0..3_i64, 0..8)), 0..60)) {
            let mut tree = Radix::default();
            for (step, tokens) in steps {
                match step {
                    0 | 1 => drop(tree.insert(&tokens, ())),
                    2 => drop(tree.find(&tokens).and_then(|key| tree.remove(key))),
                    _ => drop(tree.remove_prefixes(&tokens)),
                }
                check(&tree);
            }
        }
    }
}
